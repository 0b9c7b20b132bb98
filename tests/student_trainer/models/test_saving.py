"""An export is tried before training: what transformers would not read back is refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from shared.config.models.student import Student
from shared.errors import ConfigError
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
"""
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"}


def trust(folder: Path, *, ignored: list[str] | None = None, left_out: str = "") -> None:
    """Ask what a student of its own code, which leaves something out when saved, is trusted for."""
    tiny.save_model(folder, width=32, layers=2, tied=False)
    code = OWN_CODE.replace("IGNORED", repr(ignored)).replace("LEFT_OUT", repr(left_out))
    (folder / "own.py").write_text(code)
    tiny.edit_config(folder, model_type="own_llama", auto_map=CLASSES)
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
