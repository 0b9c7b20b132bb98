"""The model card names who taught what."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.run.run_dir import RunDir
from student_trainer.state.model_card import model_card
from student_trainer.state.usage import Usage
from tests.cluster.run_dirs import write_run

USAGE = Usage(ends=("</s>",), bos="<s>", eos="</s>", opens=True, is_framed=True, chats=False)


def card(directory: Path, **state: object) -> str:
    config = write_run(directory, domains=("code", "law", "maths"), **state)  # type: ignore[arg-type]
    return model_card(config, run_dir=RunDir(directory), step=300, frozen=None, usage=USAGE)


def test_the_only_teacher_is_named_alone(tmp_path: Path):
    assert "models/student taught by models/main with Tutelage" in card(tmp_path / "run")


def test_several_are_named_with_their_domains(tmp_path: Path):
    said = "taught by models/big in code, maths and by models/small in law with Tutelage"
    assert said in card(tmp_path / "run", teachers=("big", "small"))


def test_an_adapter_is_named_with_its_teacher(tmp_path: Path):
    directory = tmp_path / "run"
    config = write_run(directory)
    adapted = config.teachers["main"].model_copy(update={"adapter": "adapters/law"})
    config = config.model_copy(update={"teachers": {"main": adapted}})
    said = model_card(config, run_dir=RunDir(directory), step=300, frozen=None, usage=USAGE)
    assert "taught by models/main (adapter adapters/law) with Tutelage" in said


@pytest.mark.parametrize("is_framed", [False, True])
def test_the_example_frames_a_text_where_its_tokenizer_does_not(tmp_path: Path, is_framed: bool):
    directory = tmp_path / "run"
    usage = replace(USAGE, opens=is_framed, is_framed=is_framed)
    said = model_card(
        write_run(directory), run_dir=RunDir(directory), step=300, frozen=None, usage=usage
    )
    plain, framed = (
        r'tokenizer("What is 2 + 3?\n", return_tensors="pt")',
        r'tokenizer("<s>What is 2 + 3?\n", return_tensors="pt", add_special_tokens=False)',
    )
    assert (plain in said, framed in said) == (is_framed, not is_framed)


def test_text_alone_has_no_teacher(tmp_path: Path):
    assert "taught by its text alone" in card(tmp_path / "run", teacher=False)


def test_the_framing_is_said(tmp_path: Path):
    said = " ".join(card(tmp_path / "run").split())
    assert "a text was framed as `<s>, the text, </s>`, and a prompt and its response" in said
    assert "`tokenizer(text)` puts `<s>` there. Generation ends at `</s>`." in said
