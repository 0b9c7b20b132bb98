"""What is not a model in plain weights is named before the start, with the way out."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from cluster.planning.handshake import shake_hands
from cluster.planning.preparation import prepare_run
from shared.config.file import load_config
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError, HandshakeError
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


def test_a_teacher_in_few_bits_is_called_that(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher, quantization_config=stored)
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_pair.teacher).save_pretrained(folder)
    job = load_config(write_job(tmp_path, tiny_pair, teachers={"t": {"model": str(folder)}}))
    shake_hands(job)
    notes = load_engine(Teacher(model=str(folder))).notes
    assert "weights are stored in 4 bits by bitsandbytes; it computes in float32" in notes[-1]
    said = model_card(job, run_dir=RunDir(tmp_path / "run"), step=1, frozen=None, usage=USAGE)
    assert "(stored in 4 bits by bitsandbytes) with Tutelage" in said


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
