"""Models whose files hold something odd: taken where it changes nothing, refused in a sentence that
names it where it does. Teacher and student alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config.models.student import Student
from shared.errors import ConfigError
from student_trainer.models.student import load_model
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.telling import in_turn


def _config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: tiny.edit_config(folder, **fields)


def _scaled(weight: str, by: float) -> Callable[[Path], None]:
    def scale(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights[weight] = weights[weight] * by
        save_file(weights, path, metadata={"format": "pt"})

    return scale


def _with(weight: str, *sizes: int) -> Callable[[Path], None]:
    """Adds a weight that the model has no place for."""

    def add(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {weight: torch.zeros(sizes)}, path, metadata={"format": "pt"})

    return add


def _bare_decoder_of_more_layers(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    tiny.edit_config(folder, **FEWER)


def _one_value(value: float) -> Callable[[Path], None]:
    """Changes one row of the embedding, which no probe need read."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["model.embed_tokens.weight"][7, 0] = value
        save_file(weights, path, metadata={"format": "pt"})

    return change


def _cut_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


ROPE = {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}
FEWER = {"num_hidden_layers": 1, "layer_types": None}
Q_PROJ = "model.layers.0.self_attn.q_proj"
TAKEN = {
    "tables of an earlier version": _with("model.layers.0.self_attn.rotary_emb.inv_freq", 4),
    "masks of an earlier version": _with("model.layers.0.self_attn.bias", 8, 8),
    "a tower": _with("visual.blocks.0.norm.weight", 8),
    "a head for values": _with("v_head.summary.weight", 1, 32),
    "a layer for further tokens": _config(**FEWER, num_nextn_predict_layers=1),
    "a cap that its family does not read": _config(final_logit_softcapping=3.0),
    "a scale that its family does not read": _config(logits_scaling=8.0),
    "no cache": _config(use_cache=False),
    "an attention that is not installed": _config(attn_implementation="flash_attention_2"),
    "outputs of another form": _config(return_dict=False, output_attentions=True),
}
REFUSED = {
    "no numbers": (_scaled("model.norm.weight", float("nan")), r"are not finite in float32"),
    "infinite": (_scaled("lm_head.weight", float("inf")), r"are not finite in float32"),
    "one number missing": (_one_value(float("nan")), r"embed_tokens\.weight .* not finite"),
    "one number too large": (_one_value(float("-inf")), r"embed_tokens\.weight .* not finite"),
    "fewer layers": (_config(**FEWER), r"config\.json leaves out, 9 in all, as model\.layers\.1\."),
    "a bare decoder": (_bare_decoder_of_more_layers, r"leaves out, 9 in all, as layers\.1\."),
    "a bias": (_with(f"{Q_PROJ}.bias", 32), r"leaves out, 1 in all, as .*q_proj\.bias"),
    "scales": (_with(f"{Q_PROJ}.weight_scale_inv", 1), r"leaves out, .*weight_scale_inv"),
    "a norm": (_with("model.layers.0.self_attn.q_norm.weight", 8), r"leaves out, .*q_norm"),
    "a head's bias": (_with("lm_head.bias", 512), r"leaves out, 1 in all, as lm_head\.bias"),
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


@pytest.mark.parametrize(("odd", "role"), in_turn(TAKEN, ROLES))
def test_what_changes_nothing_is_taken(tmp_path: Path, model: Path, odd: str, role: str) -> None:
    TAKEN[odd](model)
    load(role, model, tmp_path)


@pytest.mark.parametrize(("odd", "role"), in_turn(REFUSED, ROLES))
def test_what_cannot_work_is_named(tmp_path: Path, model: Path, odd: str, role: str) -> None:
    make, said = REFUSED[odd]
    make(model)
    with pytest.raises(ConfigError, match=said) as refused:
        load(role, model, tmp_path)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_padding_token_of_minus_one_keeps_no_row_from_learning(model: Path) -> None:
    tiny.edit_config(model, pad_token_id=-1)
    student = load_model(Student(model=str(model)), CAUSAL_LM.model)
    embedding: Any = student.get_input_embeddings()
    student(input_ids=torch.tensor([[tiny.VOCAB - 1, 5]])).logits.square().mean().backward()
    assert embedding.weight[-1].any()
    assert embedding.weight.grad[-1].any()


def test_a_teachers_tokenizer_that_cannot_be_read_has_no_digest(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps([]))
    assert HFEngine.load(str(model)).describe().fingerprint["tokenizer"] == ""
