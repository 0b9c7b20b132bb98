"""A pair whose stop ids, padding or chat templates differ is named before the start."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.planning.handshake import shake_hands
from shared.config.file import load_config, resolve
from tests import tiny
from tests.cluster.jobs import write_job


@pytest.fixture
def copied(tmp_path: Path, tiny_pair: tiny.Pair) -> tiny.Pair:
    """The pair in folders of its own, to be changed."""
    pair = tiny.Pair(tmp_path / "teacher", tmp_path / "student")
    shutil.copytree(tiny_pair.teacher, pair.teacher)
    shutil.copytree(tiny_pair.student, pair.student)
    return pair


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def differences(tmp_path: Path, pair: tiny.Pair) -> tuple[str, ...]:
    config = resolve(load_config(write_job(tmp_path, pair)))
    (teacher,) = shake_hands(config).teachers.values()
    return teacher.differences


def test_a_pair_without_a_difference_has_no_line(tmp_path, copied):
    assert differences(tmp_path, copied) == ()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_pair_whose_stop_ids_differ_is_named_before_the_start_with_what_to_do(
    tmp_path, copied, file
):
    for folder in (copied.teacher, copied.student):
        (folder / "generation_config.json").unlink()
    if file == "generation_config.json":
        (copied.teacher / file).write_text("{}")
    edit(copied.teacher / file, eos_token_id=[2, 40])
    (line,) = differences(tmp_path, copied)
    assert "stop at different tokens" in line
    assert "(2), " in line
    assert " (40) and " in line
    assert "make eos_token_id alike" in line


def test_stop_ids_in_another_order_or_as_a_list_of_one_are_no_difference(tmp_path, copied):
    edit(copied.teacher / "generation_config.json", eos_token_id=[40, 2])
    edit(copied.student / "generation_config.json", eos_token_id=[2, 40, 2])
    assert differences(tmp_path, copied) == ()


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_pair_of_which_one_pads_with_its_end_is_named(tmp_path, copied, side):
    folder = getattr(copied, side)
    path = folder / "tokenizer_config.json"
    edit(path, pad_token=json.loads(path.read_text())["eos_token"])
    (line,) = differences(tmp_path, copied)
    assert line.startswith(f"{folder} ({side}) pads with its end of text")


def test_a_pair_whose_templates_differ_is_named_where_no_row_passes_through_one(tmp_path, copied):
    (copied.teacher / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (line,) = differences(tmp_path, copied)
    assert "have different chat templates; no row of this run passes through one" in line
