"""`tutelage cache`: what it lists, finds damaged and removes, and what it leaves alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.commands.cache import bytes_of, seconds_of
from shared.errors import ConfigError
from shared.store.target_store import TargetStore, stored_answers
from shared.targets.question import Question
from tests.cluster.jobs import write_job
from tests.shared.store.test_target_store import ROOT, SPEC, TEACHER, answer, damage, make_rows

OTHER = TEACHER | {"model": "/models/other"}


@pytest.fixture
def store(tmp_path) -> Path:
    """Answers of two teachers to one question."""
    folder = tmp_path / "store"
    for teacher in (TEACHER, OTHER):
        fill(folder, 1, 2, teacher=teacher)
    return folder


def fill(
    folder: Path, *indices: int, teacher: dict[str, str] = TEACHER, spec: Question = SPEC
) -> None:
    opened = TargetStore(folder, teacher=teacher, question=spec)
    opened.write(answer(make_rows(*indices), spec, teacher=teacher))
    opened.close()


def teachers(folder: Path) -> set[str]:
    return {answers.teacher["model"] for answers in stored_answers(folder)}


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["cache", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_ls_lists_every_question_with_what_is_stored_of_it(store, tmp_path, tiny_pair, capsys):
    tokens = int(make_rows(1, 2).num_loss_tokens().sum())
    job = write_job(tmp_path, tiny_pair, targets={"store": "store"})
    for where in (store, job):
        listed = said(capsys, "ls", where)
        assert "other: top_k 4 of 100 ids at temperature 1, 2 in fp16" in listed
        assert listed.count(f"2 rows, {tokens} tokens, ") == 2
        assert f"last used {time.strftime('%Y-%m-%d')}" in listed
        assert "2 questions" in listed


def test_a_place_without_a_store_is_refused_with_a_sentence(tmp_path, tiny_pair, capsys):
    assert said(capsys, "ls", tmp_path) == f"{tmp_path} is empty\n"
    for where, sentence in (
        (tmp_path / "nowhere", "does not exist"),
        (write_job(tmp_path, tiny_pair), "targets.store is not set"),
        ("nosuch://x", "names no file system"),
        ("ftp://127.0.0.1:1/x", "ftp://127.0.0.1:1/x cannot be reached: Connection refused; cor"),
        ("s3://me:hush@bucket/x", "with credentials in it"),
    ):
        assert main(["cache", "ls", str(where)]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert "hush" not in error


def test_verify_finds_damage_and_removes_it_only_when_told(store, capsys):
    assert "every file is sound" in said(capsys, "verify", store)
    path = next(path for path in store.glob("*/*.arrow"))
    damage(path, make_rows(1, 2))
    assert main(["cache", "verify", str(store)]) == 2
    printed = capsys.readouterr()
    assert f"damaged  {path}: " in printed.out
    assert "1 file of" in printed.err
    assert "tutelage capture CONFIG" in printed.err
    assert path.exists()
    assert f"removed  {path}: " in said(capsys, "verify", store, "--delete")
    assert not path.exists()
    assert "every file is sound" in said(capsys, "verify", store)


def test_gc_removes_leftovers_damage_and_second_copies_and_a_dry_run_nothing(store, capsys):
    ours = next(a for a in stored_answers(store) if a.teacher == TEACHER).place.local
    writers = [TargetStore(store, teacher=TEACHER, question=SPEC) for _ in range(2)]
    for seed, writer in enumerate(writers):
        writer.write(answer(make_rows(5, 6 + seed), seed=seed))
        writer.close()
    (ours / ".x.arrow.1.part").write_bytes(bytes(1000))
    (ours / "y.arrow.damaged").write_bytes(bytes(2000))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    planned = said(capsys, "gc", store, "--dry-run")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    removed = said(capsys, "gc", store)
    for printed in (planned, removed):
        assert "left by a writer that died" in printed
        assert "damaged, set aside" in printed
        assert "1 second copies of rows, 3 files put together" in printed
    assert {path.suffix for path in ours.iterdir()} == {".arrow", ".json"}
    left = TargetStore(store, teacher=TEACHER, question=SPEC)
    assert left.read(make_rows(5)).table.equals(answer(make_rows(5, 6), seed=0).table.slice(0, 1))
    assert not left.missing(make_rows(1, 2, 6, 7))
    left.close()
    assert said(capsys, "gc", store) == f"0 bytes became free in {store}\n"


def test_gc_removes_the_questions_that_are_chosen(store, capsys):
    folder = next(a for a in stored_answers(store) if a.teacher == OTHER).place.local
    for path in folder.iterdir():
        os.utime(path, (time.time() - 40 * 86_400,) * 2)
    said(capsys, "gc", store, "--older-than", "50d")
    assert teachers(store) == {"a", "/models/other"}
    said(capsys, "gc", store, "--older-than", "30d", "--teacher", "another")
    assert teachers(store) == {"a", "/models/other"}
    assert "other: top_k" in said(capsys, "gc", store, "--older-than", "30d")
    assert teachers(store) == {"a"}
    key = stored_answers(store)[0].key
    said(capsys, "gc", store, "--question", key[:8])
    assert teachers(store) == set()


@pytest.mark.parametrize("option", ["--question", "--teacher"])
def test_gc_does_not_take_an_empty_choice_for_every_question(store, capsys, option):
    for empty in ("", " "):
        assert main(["cache", "gc", str(store), option, empty]) == 2
        assert f"{option} is {empty!r}, which would choose every one" in capsys.readouterr().err


def test_gc_makes_room_by_what_was_used_longest_ago(store, capsys):
    folder = next(a for a in stored_answers(store) if a.teacher == TEACHER).place.local
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    printed = said(capsys, "gc", store, "--keep-free", "1000000TB", "--dry-run")
    assert printed.index(" a: top_k") < printed.index(" other: top_k")
    said(capsys, "gc", store, "--keep-free", "0")
    assert teachers(store) == {"a", "/models/other"}
    said(capsys, "gc", store, "--keep-free", "1000000TB")
    assert teachers(store) == set()


HOLDER = """
import sys, time
from shared.store.target_store import TargetStore
from tests.shared.store.test_target_store import SPEC, TEACHER, answer, make_rows
store = TargetStore(sys.argv[1], teacher=TEACHER, question=SPEC)
store.write(answer(make_rows(9)))
print("held", flush=True)
time.sleep(60)
"""


def test_gc_leaves_alone_what_a_live_process_holds_and_not_what_a_dead_one_did(store, capsys):
    command = [sys.executable, "-c", HOLDER, str(store)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        printed = said(capsys, "gc", store, "--older-than", "0m")
        assert "left alone, in use" in printed
        assert teachers(store) == {"a"}
        holder.kill()
    assert TargetStore(store, teacher=TEACHER, question=SPEC).missing(make_rows(1, 2, 9)) == []
    said(capsys, "gc", store, "--older-than", "0m")
    assert teachers(store) == set()


def test_answers_of_another_version_are_listed_and_go_only_when_chosen(store, capsys):
    (folder,) = (a.place.local for a in stored_answers(store) if a.teacher == OTHER)
    description = folder / "description.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 0'))
    folder.rename(folder.with_name("0" * 32))
    assert "answers of another version of Tutelage" in said(capsys, "ls", store)
    said(capsys, "gc", store)
    assert folder.with_name("0" * 32).exists()
    said(capsys, "gc", store, "--question", "0000")
    assert not folder.with_name("0" * 32).exists()


def test_ages_and_sizes_are_read_as_people_write_them():
    assert [seconds_of(text) for text in ("90m", "12h", "30d", "2w")] == [
        5400.0,
        43_200.0,
        2_592_000.0,
        1_209_600.0,
    ]
    assert [bytes_of(text) for text in ("50GB", "1.5 tb", "7")] == [5 * 10**10, 15 * 10**11, 7]
    for read, wrong in ((seconds_of, "30"), (seconds_of, "d"), (bytes_of, "many")):
        with pytest.raises(ConfigError, match="write a number"):
            read(wrong)


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_folder_of_something_else_is_no_store(command, tmp_path, capsys):
    """Neither a run, nor a folder of Arrow files or JSON inside another."""
    (tmp_path / "data" / "inside").mkdir(parents=True)
    (tmp_path / "data" / "inside" / "rows.arrow").write_bytes(b"rows")
    (tmp_path / "data" / "inside" / "facts.json").write_text("{}")
    options = ["--older-than", "1m"] if command == "gc" else []
    os.utime(tmp_path / "data" / "inside" / "rows.arrow", (0, 0))
    os.utime(tmp_path / "data" / "inside" / "facts.json", (0, 0))
    assert main(["cache", command, str(tmp_path / "data"), *options]) == 2
    assert "is no store: it holds inside, but no answers" in capsys.readouterr().err
    assert (tmp_path / "data" / "inside" / "rows.arrow").exists()


def test_an_empty_store_is_said_to_be_empty(tmp_path, capsys):
    assert said(capsys, "verify", tmp_path) == f"{tmp_path} is empty\n"


def test_a_question_that_nothing_of_can_be_read_is_damaged(tmp_path, capsys):
    fill(tmp_path / "store", 1, 2)
    (path,) = (tmp_path / "store").glob("*/*.arrow")
    path.write_bytes(b"nothing of it")
    (path.parent / "description.json").write_text("no more")
    assert main(["cache", "verify", str(tmp_path / "store")]) == 2
    assert f"damaged  {path}: " in capsys.readouterr().out
