"""Models whose files hold something odd: taken where it changes nothing, refused in a sentence that
names it where it does. Teacher and student alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.student_trainer.runs import plan_of, prepared_domains


def _config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: tiny.edit_config(folder, **fields)


def _scaled(weight: str, by: float) -> Callable[[Path], None]:
    def scale(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights[weight] = weights[weight] * by
        save_file(weights, path, metadata={"format": "pt"})

    return scale


def _cut_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


ROPE = {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}
TAKEN = {
    "a cap that its family does not read": _config(final_logit_softcapping=3.0),
    "a scale that its family does not read": _config(logits_scaling=8.0),
    "no cache": _config(use_cache=False),
    "an attention that is not installed": _config(attn_implementation="flash_attention_2"),
    "outputs of another form": _config(return_dict=False, output_attentions=True),
}
REFUSED = {
    "no numbers": (_scaled("model.norm.weight", float("nan")), r"are not finite in float32"),
    "infinite": (_scaled("lm_head.weight", float("inf")), r"are not finite in float32"),
    "activation": (_config(hidden_act="spiral"), r"its config\.json names 'spiral', which"),
    "rope": (_config(**ROPE), r"its config\.json names 'spiral', which"),
    "dtype": (_config(dtype="float33"), r"its config\.json names 'float33', which"),
    "index": (_cut_index, r"one of its \.json files is not valid JSON \(.*\); get it again"),
}
ROLES = ("teacher", "student")


def load(role: str, model: Path, scratch: Path) -> None:
    if role == "teacher":
        HFEngine.load(str(model))
        return
    pair = tiny.Pair(model, model)
    CAUSAL_LM.trust(plan_of(scratch / "run", pair, prepared_domains(scratch)).config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model", width=32, layers=2, tied=False)
    return tmp_path / "model"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("odd", TAKEN)
def test_what_changes_nothing_is_taken(tmp_path: Path, model: Path, odd: str, role: str) -> None:
    TAKEN[odd](model)
    load(role, model, tmp_path)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("odd", REFUSED)
def test_what_cannot_work_is_named(tmp_path: Path, model: Path, odd: str, role: str) -> None:
    make, said = REFUSED[odd]
    make(model)
    with pytest.raises(ConfigError, match=said) as refused:
        load(role, model, tmp_path)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_teachers_tokenizer_that_cannot_be_read_has_no_digest(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps([]))
    assert HFEngine.load(str(model)).describe().fingerprint["tokenizer"] == ""
