"""A run across tokenizers before it starts: what is read, and what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.builtin.models import train_tokenizer
from cluster.cli import main
from cluster.planning.across.rows import read_across
from cluster.planning.notes import notes
from cluster.planning.preparation import Prepared, check, prepare_run
from cluster.selftest import models
from shared.across.token_pair import TokenPair
from shared.config.file import load_config, resolve
from shared.data.row_store import RowStore
from shared.errors import HandshakeError
from tests import tiny
from tests.cluster.jobs import WORDS, write_job
from tests.shared.across.own import word_piece

FEW = 280  # tokens of the teacher
UNADAPTED = {"mixture": {"policy": "fixed"}, "losses": [{"kind": "forward_kl"}]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tiny.Pair:
    """A teacher whose tokens are shorter than the student's."""
    folder = tmp_path_factory.mktemp("across")
    found = tiny.save_pair(folder)
    text = [" ".join(words) for words in WORDS.values()]
    tokenizer = train_tokenizer(text, vocab=FEW)
    models.save_model(found.teacher, tokenizer, width=48, layers=3, seed=1)
    return found


def prepared(folder: Path, pair: tiny.Pair, *overrides: str) -> Prepared:
    job = write_job(folder, pair, cross_tokenizer="aligned", **UNADAPTED)
    return prepare_run(resolve(load_config(job, list(overrides))))


def test_two_tokenizers_are_refused_with_every_way_to_learn_across_them(
    tmp_path, pair, capsys
) -> None:
    assert main(["run", str(write_job(tmp_path, pair))]) == 2
    said = capsys.readouterr().err
    assert "do not share a vocabulary" in said
    assert all(f"cross_tokenizer={method}" in said for method in ("grouped", "aligned", "uld"))


def test_the_teacher_reads_the_text_of_every_row_in_tokens_of_its_own(tmp_path, pair) -> None:
    from transformers import AutoTokenizer

    found = prepared(tmp_path, pair)
    own, others = (AutoTokenizer.from_pretrained(f) for f in (pair.student, pair.teacher))
    for domain in found.domains:
        for split, path in domain.paths.items():
            store, theirs = RowStore.open(path), RowStore.open(domain.read_by_teacher[split])
            assert len(store) == len(theirs) > 0
            assert theirs.largest_id() < FEW
            rows, others_rows = store.take(range(len(store))), theirs.take(range(len(store)))
            pairs = (rows.column("input_ids"), others_rows.column("input_ids"))
            for ids, their_ids in zip(*pairs, strict=True):
                text, same = (
                    t.decode(i, skip_special_tokens=True)
                    for t, i in ((own, ids), (others, their_ids))
                )
                assert text == same
                assert not np.array_equal(their_ids, ids)
    assert found.across is not None
    assert found.facts.shared_vocab == FEW
    assert any("are the same bytes as one of the student's 512" in note for note in notes(found))


def test_groups_lie_in_the_runs_folder_and_the_start_says_that_there_are_some(
    tmp_path, pair, tiny_pair
) -> None:
    from cluster.planning.preparation import run_plan

    found = prepared(tmp_path, pair, "cross_tokenizer=grouped")
    plan = run_plan(found, run_dir=tmp_path / "runs" / "job", teacher=None)
    assert plan.token_pair is not None
    group_V = TokenPair.read(Path(plan.token_pair)).group_V
    assert group_V is not None
    assert FEW > len(np.unique(group_V)) - 1 > 256
    assert any("each is the group of those that begin with it" in note for note in notes(found))
    alike = prepared(tmp_path, tiny_pair, "cross_tokenizer=grouped")
    assert alike.across is not None
    assert alike.across.pair.group_V is None


def test_the_teachers_rows_are_made_once(tmp_path, pair) -> None:
    first = prepared(tmp_path, pair)
    paths = [Path(p) for d in first.domains for p in d.read_by_teacher.values()]
    made = [path.stat().st_mtime_ns for path in paths]
    assert prepared(tmp_path, pair).domains == first.domains
    assert [path.stat().st_mtime_ns for path in paths] == made
    paths[0].write_bytes(paths[0].read_bytes()[:-9])  # damaged: made again
    again = prepared(tmp_path, pair)
    assert again.domains == first.domains
    RowStore.open(paths[0])


def test_with_one_tokenizer_the_teacher_reads_the_students_rows(tmp_path, tiny_pair) -> None:
    found = prepared(tmp_path, tiny_pair)
    assert all(domain.read_by_teacher == domain.paths for domain in found.domains)
    assert any("have one tokenizer" in note for note in notes(found))


def test_a_row_longer_than_the_teacher_reads_is_refused_with_a_context_that_fits(
    tmp_path, pair
) -> None:
    short = tmp_path / "short"
    shutil.copytree(pair.teacher, short)
    tiny.edit_config(short, max_position_embeddings=60)
    with pytest.raises(
        HandshakeError, match="tokens of the teacher's, which reads 60; set"
    ) as said:
        prepared(tmp_path, tiny.Pair(short, pair.student))
    found = re.search(r"set data.context=(\d+)", str(said.value))
    assert found is not None
    assert prepared(tmp_path, tiny.Pair(short, pair.student), f"data.context={found[1]}").across


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, pair) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair.teacher, other)
    word_piece().save_pretrained(other)
    with pytest.raises(
        HandshakeError, match=r"teachers.tiny.model .* are not the bytes of the text"
    ):
        prepared(tmp_path, tiny.Pair(other, pair.student))


def test_a_teacher_of_another_tokenizer_is_neither_shown_prompts_nor_writes_in_rounds(
    tmp_path, pair, capsys
) -> None:
    job = write_job(tmp_path, pair, cross_tokenizer="aligned", **UNADAPTED)
    assert main(["prompts", "optimise", str(job)]) == 2
    assert "a teacher is shown no prompts; leave it out" in capsys.readouterr().err
    assert main(["active", str(job), "active={method: pgkd}"]) == 2
    assert "writes in rounds is in the student's tokens" in capsys.readouterr().err


def test_another_student_tokenizer_of_the_same_sizes_makes_other_rows(tmp_path, pair) -> None:
    config = resolve(load_config(write_job(tmp_path, pair, cross_tokenizer="aligned", **UNADAPTED)))
    found = check(config).across
    assert found is not None
    (domain, _) = prepared(tmp_path, pair).domains
    other = replace(found, digests=("another", found.digests[1]))
    bounds = {"cache": tmp_path / "cache", "context": 64, "teacher_context": None}
    (first,), _ = read_across([domain], found, **bounds)
    (second,), _ = read_across([domain], other, **bounds)
    assert first.read_by_teacher == domain.read_by_teacher
    assert second.read_by_teacher["train"] != first.read_by_teacher["train"]


def test_selftest_is_refused_across_tokenizers(tmp_path, pair, capsys) -> None:
    job = write_job(tmp_path, pair, cross_tokenizer="aligned", **UNADAPTED)
    assert main(["selftest", str(job)]) == 2
    assert "selftest compares a teacher and a student at the same tokens" in capsys.readouterr().err


def test_what_pairs_the_tokens_lies_in_the_runs_folder(tmp_path, pair) -> None:
    from cluster.planning.preparation import run_plan

    found = prepared(tmp_path, pair)
    plan = run_plan(found, run_dir=tmp_path / "runs" / "job", teacher=None)
    assert plan.token_pair is not None
    assert found.across is not None
    read = TokenPair.read(Path(plan.token_pair))
    assert read.overlap == found.across.pair.overlap > 256
    assert (plan.kl_kind, plan.validation_question) == ("none", None)
