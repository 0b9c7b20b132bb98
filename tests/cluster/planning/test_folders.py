"""What is not a model in plain weights is named before the start, with the way out."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cluster.planning.handshake import shake_hands
from cluster.planning.preparation import prepare_run
from shared.config.file import load_config
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError, HandshakeError
from shared.loading import in_few_bits, in_int8
from shared.run.run_dir import RunDir
from student_trainer.state.model_card import model_card
from teacher_service.engine.audit import load_engine
from tests import tiny
from tests.cluster.jobs import write_job
from tests.student_trainer.state.test_model_card import USAGE

QUANTISED = {
    "awq": ({"quant_method": "awq", "bits": 4}, "in 4 bits by awq"),
    "fp8": ({"quant_method": "fp8"}, "quantised by fp8"),
    "bnb": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits by bitsandbytes"),
    "unknown": ({"quant_method": "zip9"}, "quantised by zip9"),
}


@pytest.fixture
def marked(tmp_path: Path, tiny_pair: tiny.Pair, request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model whose config says that its weights are quantised, and how that is called."""
    settings, words = QUANTISED[request.param]
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_pair.teacher, folder)
    tiny.edit_config(folder, quantization_config=settings)
    return str(folder), words


@pytest.mark.parametrize("marked", QUANTISED, indirect=True)
def test_a_student_in_few_bits_is_refused(tmp_path, tiny_pair, marked) -> None:
    folder, words = marked
    job = load_config(write_job(tmp_path, tiny_pair, student={"model": folder}))
    with pytest.raises(ConfigError, match=rf"stored {words}, and such weights do not train"):
        shake_hands(job)


@pytest.mark.parametrize("marked", QUANTISED, indirect=True)
def test_a_teacher_is_not_quantised_twice(tmp_path, tiny_pair, marked) -> None:
    folder, words = marked
    teacher = {"model": folder, "quantisation": "nf4"}
    job = load_config(write_job(tmp_path, tiny_pair, teachers={"t": teacher}))
    with pytest.raises(ConfigError, match=rf"already stored {words}; set .*quantisation=none"):
        shake_hands(job)


IN_FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
IN_EIGHT = BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize(
    ("bits", "scale"), [(4, 1), (8, 4)], ids=["4 bits", "8 bits, with outliers"]
)
def test_a_teacher_in_few_bits_is_called_that(
    tmp_path: Path, tiny_pair: tiny.Pair, bits: int, scale: float
) -> None:
    """What rows of a unit change about each other, as an outlier that sends its column past eight
    bits for all of them, is said and no reason to refuse."""
    folder = shutil.copytree(tiny_pair.teacher, tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    model.save_pretrained(folder)
    stored = IN_FOUR if bits == 4 else IN_EIGHT
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=stored)
    model.save_pretrained(folder)
    job = load_config(write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(folder)}}))
    shake_hands(job)
    engine = load_engine(Teacher(model=str(folder)))
    said = f"weights are stored in {bits} bits by bitsandbytes; it computes in float32"
    assert said in engine.notes[-1]
    assert any("rows beside it" in note for note in engine.notes) == (bits == 8)
    assert in_int8(engine.fingerprint) == (bits == 8)
    assert in_few_bits(engine.fingerprint)
    assert engine.trust.passes.shared
    said = model_card(job, run_dir=RunDir(tmp_path / "run"), step=1, frozen=None, usage=USAGE)
    assert f"(stored in {bits} bits by bitsandbytes) with Tutelage" in said


@pytest.mark.parametrize("short", ["teacher", "student"])
def test_text_beyond_a_models_embeddings_is_named_before_the_start(
    tmp_path: Path, tiny_pair: tiny.Pair, short: str
) -> None:
    """Where the text has no such token, the models do."""
    folder, refused = tmp_path / "short", None
    shutil.copytree(getattr(tiny_pair, short), folder)
    for rows in (tiny.VOCAB - 1, 200):
        model = AutoModelForCausalLM.from_pretrained(getattr(tiny_pair, short))
        model.resize_token_embeddings(rows)
        model.save_pretrained(folder)
        named = {"teachers": {"t": {"model": str(folder)}}} if short == "teacher" else {}
        named |= {"student": {"model": str(folder)}} if short == "student" else {}
        try:
            prepare_run(load_config(write_job(tmp_path, tiny_pair, **named), ["targets.top_k=8"]))
        except HandshakeError as error:
            refused = rows, str(error)
    assert refused is not None
    assert refused[0] == 200
    assert "both hold 200 of the tokenizer's 512 ids" in refused[1]


def other_sizes(folder: Path) -> None:
    tiny.edit_config(folder, intermediate_size=8)


def test_a_captured_run_needs_no_weights_of_its_teacher(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_pair.teacher, folder)
    other_sizes(folder)
    targets = {"teacher_free": True, "store": str(tmp_path / "store")}
    job = write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(folder)}}, targets=targets)
    assert prepare_run(load_config(job)).trust.packed
