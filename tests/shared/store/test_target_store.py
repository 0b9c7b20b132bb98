"""Laws of the target store: bit-equal, teacher-free, torn tails, several writers."""

import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from shared.data.rows import Rows
from shared.errors import ConfigError, DamagedError, TeacherError
from shared.locations import Location
from shared.store.readers import RecordingReader, StoreReader
from shared.store.target_store import (
    MANY_FILES,
    TargetStore,
    stored_answers,
    stored_teacher,
)
from shared.store.upkeep import questions, verify
from shared.targets.question import Question
from shared.targets.reader import ReaderStats
from shared.targets.soft_targets import SoftTargets
from tests.answers import Given, changed, decoded, encoded, question_of

ROOT = Path(__file__).resolve().parents[3]
SPEC = question_of(top_k=4, shared_vocab=100, temperatures=(1.0, 2.0), hidden_layers=(1,))
TEACHER = {"model": "a", "weights": "0"}


def make_rows(*indices: int) -> Rows:
    ids = [np.arange(index + 3) * 7 % 100 for index in indices]
    return Rows.build(
        domains=["text"] * len(indices),
        indices=indices,
        input_ids=ids,
        doc_starts=[np.zeros(1)] * len(indices),
        loss_masks=[np.append(np.ones(len(row) - 1), 0) for row in ids],
    )


def answer(
    rows: Rows, spec: Question = SPEC, seed: int = 0, teacher: dict[str, str] = TEACHER
) -> SoftTargets:
    rng = np.random.default_rng(seed)
    num = int(rows.num_loss_tokens().sum())
    arrays = Given(
        ids_NK=rng.integers(0, 100, (num, spec.ask.num_ids)),
        logprobs_NK=-rng.random((num, spec.ask.num_ids), np.float32),
        log_tail_NS=-rng.random((num, len(spec.ask.temperatures)), np.float32),
        label_logprob_N=-rng.random(num, np.float32),
        hidden_ND={n: rng.integers(0, 2**16, (num, 5)).astype(np.uint16) for n in (1,)},
    )
    return SoftTargets.build(
        question=spec,
        teacher=teacher,
        row_hashes=rows.hashes(),
        num_targets_R=rows.num_loss_tokens(),
        columns=encoded(spec, arrays),
    )


class Inventing:
    """A reader whose every answer differs from the one before."""

    def __init__(self) -> None:
        self.asked, self.units = deque(), 0
        self.stats = ReaderStats()

    def submit(self, rows: Rows, spec: Question) -> None:
        self.asked.append((rows, spec))

    def next(self) -> SoftTargets:
        self.units += 1
        return answer(*self.asked.popleft(), seed=self.units)

    def close(self) -> None:
        self.asked.clear()


def test_a_stored_unit_is_read_back_bit_for_bit(tmp_path):
    rows = make_rows(5, 0, 9)
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    store.write(answer(rows))
    for reader in (store, TargetStore(tmp_path, teacher=TEACHER, question=SPEC)):
        found = reader.read(rows)
        found.check(rows, SPEC, TEACHER)
        assert found.table.equals(answer(rows).table, check_metadata=True)
        assert found.num_bytes == answer(rows).num_bytes


def test_units_are_rebuilt_from_rows_of_other_units_in_any_order(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    first, second = make_rows(1, 2, 3), make_rows(4, 5)
    store.write(answer(first, seed=1))
    store.write(answer(second, seed=2))
    mixed = store.read(make_rows(5, 2))
    mixed.check(make_rows(5, 2), SPEC, TEACHER)
    one, two = decoded(answer(first, seed=1)), decoded(answer(second, seed=2))
    starts = np.cumsum([0, *first.num_loss_tokens()])
    np.testing.assert_array_equal(
        decoded(mixed).logprobs_NK,
        np.concatenate([two.logprobs_NK[-7:], one.logprobs_NK[starts[1] : starts[2]]]),
    )


def test_a_row_that_is_not_stored_stops_the_run_by_name(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    store.write(answer(make_rows(1)))
    store.close()
    reader = StoreReader(tmp_path)
    reader.submit(make_rows(1), SPEC)
    reader.submit(make_rows(1, 8), SPEC)
    reader.next()
    with pytest.raises(TeacherError, match="lacks 1 of 2 rows, first text/8"):
        reader.next()
    assert (reader.stats.units, reader.stats.cache_hits) == (1, 1)


def test_answers_are_written_before_they_are_delivered_and_then_come_from_disk(tmp_path):
    inner = Inventing()
    reader = RecordingReader(inner, tmp_path, teacher=TEACHER)
    for rows in (make_rows(1, 2), make_rows(3)):
        reader.submit(rows, SPEC)
    live = [reader.next(), reader.next()]  # no close: as if killed here
    again = RecordingReader(inner, tmp_path, teacher=TEACHER)
    for rows in (make_rows(3), make_rows(4), make_rows(1, 2)):
        again.submit(rows, SPEC)
    found = [again.next() for _ in range(3)]
    assert inner.units == 3
    assert found[0].table.equals(live[1].table)
    assert found[2].table.equals(live[0].table)
    assert (again.stats.units, again.stats.cache_hits) == (3, 2)


def test_what_a_killed_writer_left_half_written_costs_only_its_unit(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    store.write(answer(make_rows(0)))
    (path,) = tmp_path.glob("*/*.arrow")
    half = path.with_name(f".{path.name}.0.part")
    half.write_bytes(path.read_bytes()[:100])
    again = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    assert again.missing(make_rows(0, 1)) == ["text/1"]


def damage(path: Path, rows: Rows) -> None:
    """Change a byte of the answers."""
    whole = bytearray(path.read_bytes())
    label_N = answer(rows).arrays().label_logprob_N
    at = whole.index(label_N.tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["a byte", "truncated", "of another teacher"])
def test_a_damaged_file_stops_a_run_without_a_teacher_and_is_asked_again_with_one(
    tmp_path, how, caplog
):
    rows = make_rows(1)
    TargetStore(tmp_path, teacher=TEACHER, question=SPEC).write(answer(rows))
    (path,) = tmp_path.glob("*/*.arrow")
    if how == "a byte":
        damage(path, rows)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    else:
        other = TEACHER | {"weights": "1"}
        TargetStore(tmp_path / "other", teacher=other, question=SPEC).write(
            answer(rows, teacher=other)
        )
        (foreign,) = (tmp_path / "other").glob("*/*.arrow")
        path.write_bytes(foreign.read_bytes())
        shutil.rmtree(tmp_path / "other")
    free = StoreReader(tmp_path)
    free.submit(rows, SPEC)
    with pytest.raises(DamagedError, match=rf"{path.name} is damaged.*cache verify .* --delete"):
        free.next()
    free.close()
    inner = Inventing()
    live = RecordingReader(inner, tmp_path, teacher=TEACHER)
    live.submit(rows, SPEC)
    assert live.next().table.equals(answer(rows, seed=1).table)
    live.close()
    assert "set aside, and the teacher is asked for its rows again" in caplog.text
    assert path.with_name(path.name + ".damaged").exists()
    assert (inner.units, live.stats.cache_hits) == (1, 0)
    free = StoreReader(tmp_path)
    free.submit(rows, SPEC)
    assert free.next().table.equals(answer(rows, seed=1).table)


def test_of_a_row_that_is_stored_the_stored_answer_is_delivered_in_any_unit(tmp_path):
    inner = Inventing()
    reader = RecordingReader(inner, tmp_path, teacher=TEACHER)
    units = [make_rows(1, 2), make_rows(2, 3), make_rows(4, 4), make_rows(3, 1, 4)]
    for rows in units:  # all asked before any is answered
        reader.submit(rows, SPEC)
    delivered = [reader.next() for _ in units]
    assert (inner.units, reader.stats.cache_hits) == (4, 0)
    free = StoreReader(tmp_path, teacher=TEACHER)
    for rows, live in zip(units, delivered, strict=True):
        live.check(rows, SPEC, TEACHER)
        free.submit(rows, SPEC)
        assert free.next().table.equals(live.table)


def test_a_store_read_cold_warm_and_mixed_says_so(tmp_path):
    inner = Inventing()
    rates = []
    for units in ((1, 2), (1, 2), (2, 3)):
        reader = RecordingReader(inner, tmp_path, teacher=TEACHER)
        for index in units:
            reader.submit(make_rows(index), SPEC)
            reader.next()
        reader.close()
        rates.append(reader.stats.cache_hits / reader.stats.units)
    assert rates == [0.0, 1.0, 0.5]


def test_a_writer_puts_its_files_together_under_the_eyes_of_a_reader(tmp_path):
    writer = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    for index in range(MANY_FILES - 1):
        writer.write(answer(make_rows(index), seed=index))
    reader = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    writer.write(answer(make_rows(MANY_FILES), seed=MANY_FILES))
    assert len(list(tmp_path.glob("*/*.arrow"))) == 1
    for store in (writer, reader, TargetStore(tmp_path, teacher=TEACHER, question=SPEC)):
        for index in (0, 5, MANY_FILES - 2):
            found = store.read(make_rows(index))
            assert found.table.equals(answer(make_rows(index), seed=index).table)
    assert not reader.missing(make_rows(MANY_FILES))


def test_the_copy_that_was_committed_first_is_the_one_that_is_read(tmp_path):
    first, second = (TargetStore(tmp_path, teacher=TEACHER, question=SPEC) for _ in range(2))
    second.write(answer(make_rows(7), seed=7))
    first.write(answer(make_rows(7), seed=8))
    again = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    assert again.read(make_rows(7)).table.equals(answer(make_rows(7), seed=7).table)


WRITER = """
import sys
from shared.store.target_store import TargetStore
from tests.shared.store.test_target_store import SPEC, TEACHER, answer, make_rows
store = TargetStore(sys.argv[1], teacher=TEACHER, question=SPEC)
for index in range(60):
    store.write(answer(make_rows(index % 50), seed=int(sys.argv[2])))
if sys.argv[2] != "0":
    store.close()
"""


def test_processes_that_write_at_once_leave_a_sound_store(tmp_path):
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), str(n)] for n in range(3)]
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    assert not store.missing(make_rows(*range(50)))
    for index in range(50):
        found = store.read(make_rows(index)).table
        assert any(found.equals(answer(make_rows(index), seed=n).table) for n in range(3))
    assert list(verify(Location.of(tmp_path))) == []


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_store_lies_on_any_file_system(tmp_path, kind):
    where = f"file://{tmp_path}/store" if kind == "file" else f"memory://{tmp_path.name}"
    inner = Inventing()
    reader = RecordingReader(inner, where, teacher=TEACHER)
    units = [make_rows(1, 2), make_rows(3)]
    for rows in units:
        reader.submit(rows, SPEC)
    live = [reader.next() for _ in units]
    reader.close()
    free = StoreReader(where)
    free.submit(make_rows(3), SPEC)
    assert free.next().table.equals(live[1].table)
    assert [(a.teacher, a.question) for a in stored_answers(where)] == [(TEACHER, SPEC)]
    (question,) = questions(Location.of(where))
    assert question.holding.rows == 3
    assert len(question.files) == 1
    assert list(verify(Location.of(where))) == []


def test_a_lost_description_is_read_from_the_answers(tmp_path):
    TargetStore(tmp_path, teacher=TEACHER, question=SPEC).write(answer(make_rows(1)))
    (description,) = tmp_path.glob("*/description.json")
    for text in ("", '{"teacher": {}}'):
        description.write_text(text)
        assert stored_teacher(tmp_path, SPEC) == TEACHER


def test_several_writers_at_once_lose_nothing(tmp_path):
    writers = [TargetStore(tmp_path, teacher=TEACHER, question=SPEC) for _ in range(3)]
    for index in range(9):
        writers[index % 3].write(answer(make_rows(index, 100), seed=index))
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    assert not store.missing(make_rows(*range(9), 100))
    assert len(store) == 10


def test_teachers_and_questions_never_share_a_folder(tmp_path):
    other = question_of(top_k=5, shared_vocab=100, hidden_layers=(1,))
    TargetStore(tmp_path, teacher=TEACHER, question=SPEC).write(answer(make_rows(1)))
    for teacher, spec in ((TEACHER, other), (TEACHER | {"weights": "1"}, SPEC)):
        assert TargetStore(tmp_path, teacher=teacher, question=spec).missing(make_rows(1))
    assert stored_teacher(tmp_path, SPEC) == TEACHER
    with pytest.raises(ConfigError, match="asked is top_k"):
        stored_teacher(tmp_path, other)
    assert [(a.teacher, a.question) for a in stored_answers(tmp_path)] == [(TEACHER, SPEC)]


def test_a_store_of_another_teacher_than_the_named_one_is_refused(tmp_path):
    teacher = {"model": "some/one", "dtype": "float32", "adapter": "", "weights": "0"}
    for stored in (teacher, teacher | {"model": "other"}):
        TargetStore(tmp_path, teacher=stored, question=SPEC).write(
            answer(make_rows(1), teacher=stored)
        )
    named = {"model": "one", "dtype": "float32", "adapter": ""}
    assert stored_teacher(tmp_path, SPEC, named=named) == teacher
    with pytest.raises(ConfigError, match="has answers of 2 teachers"):
        stored_teacher(tmp_path, SPEC)
    for change in ({"model": "third"}, {"dtype": "bfloat16"}, {"adapter": "x"}):
        wanted = " ".join(filter(None, (named | change).values()))
        with pytest.raises(ConfigError, match=f"one float32.* but teachers names {wanted};"):
            stored_teacher(tmp_path, SPEC, named=named | change)


@pytest.mark.parametrize("ids", ["elias_fano", "plain"])
def test_ids_lie_on_disk_as_asked_and_are_found_however_they_are_asked(tmp_path, ids):
    inner = Inventing()
    writing = RecordingReader(inner, tmp_path, teacher=TEACHER, ids=ids)
    writing.submit(make_rows(1, 2), SPEC)
    live = writing.next()
    assert live.table.equals(answer(make_rows(1, 2), seed=1).table)
    writing.close()
    reader = StoreReader(tmp_path)
    reader.submit(make_rows(1, 2), changed(SPEC, ids="plain"))
    found = reader.next()
    assert found.question.ask.ids == ids
    assert found.table.equals(live.with_ids(ids).table, check_metadata=True)
    np.testing.assert_array_equal(decoded(found).ids_NK, decoded(live).ids_NK)


def test_rows_whose_ids_are_written_in_two_ways_make_one_unit(tmp_path):
    for seed, (index, ids) in enumerate(((1, "plain"), (2, "elias_fano"))):
        store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC, ids=ids)
        store.write(answer(make_rows(index), seed=seed))
        store.close()
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    for indices, ids in (((1, 2), "plain"), ((2, 1), "elias_fano")):
        found = store.read(make_rows(*indices))
        found.check(make_rows(*indices), SPEC, TEACHER)
        assert found.question.ask.ids == ids
        parts = [decoded(answer(make_rows(i), seed=i - 1)).ids_NK for i in indices]
        np.testing.assert_array_equal(decoded(found).ids_NK, np.concatenate(parts))


def test_answers_stored_before_the_entropy_could_be_asked_for_are_found(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    store.write(answer(make_rows(1)))
    (answers,) = stored_answers(tmp_path)
    assert answers.key == "90351914085a4ee8d376837680bc807a"
    prompted = TargetStore(tmp_path, teacher=TEACHER, question=changed(SPEC, prompts="a"))
    assert prompted.missing(make_rows(1)) == ["text/1"]
    asking = TargetStore(tmp_path, teacher=TEACHER, question=changed(SPEC, entropy=True))
    assert asking.missing(make_rows(1))


def test_an_empty_unit_has_the_columns_of_the_others(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, question=SPEC)
    store.write(answer(make_rows(1)))
    empty = store.read(make_rows())
    empty.check(make_rows(), SPEC, TEACHER)
    assert decoded(empty).ids_NK.shape == (0, 4)
