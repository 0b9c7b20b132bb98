"""An export is tried before training: what transformers would not read back is refused."""

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.config.models.student import Student
from shared.errors import ConfigError, StorageError
from student_trainer.models import saving
from student_trainer.models.saving import _save_hollow, refuse_unsaveable
from student_trainer.models.student import load_model
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.families.making import save_family
from tests.student_trainer.runs import plan_of, prepared_domains

KIND = CAUSAL_LM.model
OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != LEFT_OUT}

class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
    _keys_to_ignore_on_save = IGNORED

    def state_dict(self, *args, **options):
        found = super().state_dict(*args, **options)
        return {name: SCALE * w if "down_proj" in name else w for name, w in found.items()}
"""
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"}


def trust(
    folder: Path,
    *,
    ignored: list[str] | None = None,
    left_out: str = "",
    scale: float = 1,
    **fields: Any,
) -> None:
    """Ask what a student of its own code, which leaves something out or changes it when saved, is
    trusted for; `fields` of its config are not their defaults."""
    tiny.save_model(folder, width=32, layers=2, tied=False)
    named = {"IGNORED": ignored, "LEFT_OUT": left_out, "SCALE": scale}
    code = OWN_CODE
    for name, value in named.items():
        code = code.replace(name, repr(value))
    (folder / "own.py").write_text(code)
    tiny.edit_config(folder, model_type="own_llama", auto_map=CLASSES, **fields)
    rows, pair = prepared_domains(folder.parent), tiny.Pair(folder, folder)
    own: dict = {"student": {"trust_remote_code": True, "workers": 1}}
    CAUSAL_LM.trust(plan_of(folder.parent / "run", pair, rows, **own).config)


def test_code_of_its_own_that_saves_all_is_taken(tmp_path: Path) -> None:
    trust(tmp_path / "whole")


def test_a_weight_that_is_not_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ignoring .* at 1 weights, as model\.norm\.weight; set"):
        trust(tmp_path / "ignoring", ignored=["model.norm.weight"])


def test_a_size_that_is_not_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"forgetting .* since it cannot be loaded: .*; set") as e:
        trust(tmp_path / "forgetting", left_out="intermediate_size")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", 0.5, r"rms_norm_eps 1e-06, not 0\.5"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 50.0},
            r"rope_parameters .* not .*50\.0\}",
        ),
    ],
)
def test_a_field_that_is_not_saved_is_named(
    tmp_path: Path, field: str, value: Any, said: str
) -> None:
    """Of no size, so that every weight still fits."""
    with pytest.raises(ConfigError, match=rf"forgetting .* config\.json would say {said}; set"):
        trust(tmp_path / "forgetting", left_out=field, **{field: value})


def test_weights_that_are_saved_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scaling .* its logits would be off by .* largest one"):
        trust(tmp_path / "scaling", scale=0.5)


def test_a_disk_without_room_for_the_trial_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "TemporaryDirectory", full)
    with pytest.raises(StorageError, match=r"No space left on device; free .* or set TMPDIR"):
        trust(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt_oss", "mamba2", "tied"])
def test_the_trial_holds_the_names_and_sizes_of_a_saved_model(
    tmp_path: Path, family: str, dtype: str
) -> None:
    if family == "tied":
        tiny.save_model(tmp_path / "model", width=32, layers=2, tied=True)
    else:
        save_family(family, tmp_path / "model", seed=1)
    asked = Student.model_validate({"model": str(tmp_path / "model"), "dtype": dtype})
    model = load_model(asked, KIND)
    refuse_unsaveable(model, asked, KIND)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "hollow").mkdir()
    _save_hollow(model, tmp_path / "hollow")
    written, hollow = (load_file(tmp_path / f / "model.safetensors") for f in ("saved", "hollow"))
    facts = [{n: (t.shape, t.dtype) for n, t in found.items()} for found in (written, hollow)]
    assert facts[0] == facts[1]
    assert not any(bool(weight.any()) for weight in hollow.values())
