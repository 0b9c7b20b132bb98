"""An export is tried before training: what transformers would not read back is refused."""

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

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
MORE
    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != LEFT_OUT}

class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
    _keys_to_ignore_on_save = IGNORED

    def state_dict(self, *args, **options):
        found = super().state_dict(*args, **options)
        return {name: SCALE * w if "down_proj" in name else w for name, w in found.items()}

    def forward(self, *args, **options):
        FORWARD
        return super().forward(*args, **options)
"""
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"}


def trust(
    folder: Path,
    *,
    ignored: list[str] | None = None,
    left_out: str = "",
    scale: float = 1,
    more: str = "",
    forward: str = "pass",
    zero_head: bool = False,
    **fields: Any,
) -> None:
    """Ask what a student of its own code, which leaves something out or changes it when saved, is
    trusted for; `fields` of its config are not their defaults."""
    tiny.save_model(folder, width=32, layers=2, tied=False)
    named = {"IGNORED": ignored, "LEFT_OUT": left_out, "SCALE": scale}
    code = OWN_CODE
    for name, value in named.items():
        code = code.replace(name, repr(value))
    code = code.replace("MORE", more).replace("FORWARD", forward)
    if zero_head:
        weights = load_file(folder / "model.safetensors")
        save_file(
            weights | {"lm_head.weight": 0 * weights["lm_head.weight"]},
            folder / "model.safetensors",
            {"format": "pt"},
        )
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
    with pytest.raises(
        ConfigError, match=r"scaling .* its logits would be off by 3\..*, the largest"
    ):
        trust(tmp_path / "scaling", scale=0.5)


@pytest.mark.parametrize("where", ["a folder", "its weights"])
def test_a_disk_without_room_for_the_trial_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Safetensors has an error of its own, which is none of the operating system."""

    def full(*_: object, **__: object) -> None:
        text = "No space left on device"
        if where == "a folder":
            raise OSError(errno.ENOSPC, text)
        raise SafetensorError(f"Error while serializing: I/O error: {text} (os error 28)")

    if where == "a folder":
        monkeypatch.setattr(saving, "TemporaryDirectory", full)
    else:
        save = PreTrainedModel.save_pretrained
        of_llama = {"LlamaForCausalLM": save}
        monkeypatch.setattr(
            PreTrainedModel,
            "save_pretrained",
            lambda model, *a, **k: of_llama.get(type(model).__name__, full)(model, *a, **k),
        )
    with pytest.raises(StorageError, match=r"(?i)no space left on device.*; free .* or set TMPDIR"):
        trust(tmp_path / "whole")


ODD_DEFAULTS = """
    def __init__(self, dims=(1, 2), table=None, **options):
        self.dims, self.table = dims, table or {1: 2}
        super().__init__(**options)
"""


def test_defaults_that_json_writes_otherwise_and_a_head_of_zeros_are_taken(tmp_path: Path) -> None:
    trust(tmp_path / "odd", more=ODD_DEFAULTS, zero_head=True)


def test_own_code_that_cannot_read_what_it_saved_is_refused(tmp_path: Path) -> None:
    broken = "1 / 0 if 'tmp' in str(self.config._name_or_path).rsplit('/', 1)[-1] else 1"
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*division by zero"):
        trust(tmp_path / "broken", forward=broken)


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
