"""Laws of the target store: bit-equal, teacher-free, torn tails, several writers."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import ConfigError, TeacherError
from shared.rows import Rows
from shared.soft_targets import ReaderStats, SoftTargets, TargetArrays, TargetSpec
from shared.target_store import (
    RecordingReader,
    StoreReader,
    TargetStore,
    stored_answers,
    stored_teacher,
)

SPEC = TargetSpec(top_k=4, shared_vocab=100, temperatures=(1.0, 2.0), hidden_layers=(1,))
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


def answer(rows: Rows, spec: TargetSpec = SPEC, seed: int = 0) -> SoftTargets:
    rng = np.random.default_rng(seed)
    num = int(rows.num_loss_tokens().sum())
    arrays = TargetArrays(
        ids_NK=rng.integers(0, 100, (num, spec.top_k)),
        logprobs_NK=-rng.random((num, spec.top_k), np.float32),
        log_tail_NS=-rng.random((num, len(spec.temperatures)), np.float32),
        label_logprob_N=-rng.random(num, np.float32),
        hidden_ND={n: rng.integers(0, 2**16, (num, 5)).astype(np.uint16) for n in (1,)},
    )
    return SoftTargets.build(
        spec=spec,
        teacher=TEACHER,
        row_hashes=rows.hashes(),
        num_targets_R=rows.num_loss_tokens(),
        arrays=arrays,
    )


class Inventing:
    """A reader whose every answer differs from the one before."""

    def __init__(self) -> None:
        self.asked, self.units = deque(), 0
        self.stats = ReaderStats()

    def submit(self, rows: Rows, spec: TargetSpec) -> None:
        self.asked.append((rows, spec))

    def next(self) -> SoftTargets:
        self.units += 1
        return answer(*self.asked.popleft(), seed=self.units)

    def close(self) -> None:
        self.asked.clear()


def test_a_stored_unit_is_read_back_bit_for_bit(tmp_path):
    rows = make_rows(5, 0, 9)
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    store.write(answer(rows))
    for reader in (store, TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)):
        found = reader.read(rows)
        found.check(rows, SPEC, TEACHER)
        assert found.table.equals(answer(rows).table, check_metadata=True)
        assert found.num_bytes == answer(rows).num_bytes


def test_units_are_rebuilt_from_rows_of_other_units_in_any_order(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    first, second = make_rows(1, 2, 3), make_rows(4, 5)
    store.write(answer(first, seed=1))
    store.write(answer(second, seed=2))
    mixed = store.read(make_rows(5, 2))
    mixed.check(make_rows(5, 2), SPEC, TEACHER)
    one, two = answer(first, seed=1).arrays(), answer(second, seed=2).arrays()
    starts = np.cumsum([0, *first.num_loss_tokens()])
    np.testing.assert_array_equal(
        mixed.arrays().logprobs_NK,
        np.concatenate([two.logprobs_NK[-7:], one.logprobs_NK[starts[1] : starts[2]]]),
    )


def test_a_row_that_is_not_stored_stops_the_run_by_name(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
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


def test_a_torn_tail_costs_only_the_unit_it_tore(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    sizes = []
    for index in range(4):
        store.write(answer(make_rows(index)))
        (path,) = tmp_path.glob("*/*.arrow")
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in range(sizes[2], sizes[3]):
        path.write_bytes(whole[:size])
        torn = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
        assert torn.missing(make_rows(0, 1, 2, 3)) == ["text/3"]
    torn.write(answer(make_rows(3)))
    healed = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    assert not healed.missing(make_rows(0, 1, 2, 3))


def test_several_writers_at_once_lose_nothing(tmp_path):
    writers = [TargetStore(tmp_path, teacher=TEACHER, spec=SPEC) for _ in range(3)]
    for index in range(9):
        writers[index % 3].write(answer(make_rows(index, 100), seed=index))
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    assert not store.missing(make_rows(*range(9), 100))
    assert len(store) == 10


def test_teachers_and_questions_never_share_a_folder(tmp_path):
    other = TargetSpec(top_k=5, shared_vocab=100, hidden_layers=(1,))
    TargetStore(tmp_path, teacher=TEACHER, spec=SPEC).write(answer(make_rows(1)))
    for teacher, spec in ((TEACHER, other), (TEACHER | {"weights": "1"}, SPEC)):
        assert TargetStore(tmp_path, teacher=teacher, spec=spec).missing(make_rows(1))
    assert stored_teacher(tmp_path, SPEC) == TEACHER
    with pytest.raises(ConfigError, match="asked is top_k"):
        stored_teacher(tmp_path, other)
    assert [(a.teacher, a.spec) for a in stored_answers(tmp_path)] == [(TEACHER, SPEC)]


@pytest.mark.parametrize("ids", ["elias_fano", "plain"])
def test_ids_lie_on_disk_as_asked_and_are_found_however_they_are_asked(tmp_path, ids):
    inner = Inventing()
    writing = RecordingReader(inner, tmp_path, teacher=TEACHER, ids=ids)
    writing.submit(make_rows(1, 2), SPEC)
    live = writing.next()
    assert live.table.equals(answer(make_rows(1, 2), seed=1).table)
    writing.close()
    reader = StoreReader(tmp_path)
    reader.submit(make_rows(1, 2), replace(SPEC, ids="plain"))
    found = reader.next()
    assert found.spec.ids == ids
    assert found.table.equals(live.with_ids(ids).table, check_metadata=True)
    np.testing.assert_array_equal(found.arrays().ids_NK, live.arrays().ids_NK)


def test_rows_whose_ids_are_written_in_two_ways_make_one_unit(tmp_path):
    for seed, (index, ids) in enumerate(((1, "plain"), (2, "elias_fano"))):
        store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC, ids=ids)
        store.write(answer(make_rows(index), seed=seed))
        store.close()
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    for indices, ids in (((1, 2), "plain"), ((2, 1), "elias_fano")):
        found = store.read(make_rows(*indices))
        found.check(make_rows(*indices), SPEC, TEACHER)
        assert found.spec.ids == ids
        parts = [answer(make_rows(i), seed=i - 1).arrays().ids_NK for i in indices]
        np.testing.assert_array_equal(found.arrays().ids_NK, np.concatenate(parts))


def test_answers_stored_before_the_entropy_could_be_asked_for_are_found(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    store.write(answer(make_rows(1)))
    (folder,) = tmp_path.iterdir()
    assert folder.name == "0daff4617402c18e79a9c5eea036b3d9"
    prompted = TargetStore(tmp_path, teacher=TEACHER, spec=replace(SPEC, prompts="a"))
    assert prompted.missing(make_rows(1)) == ["text/1"]
    asking = TargetStore(tmp_path, teacher=TEACHER, spec=replace(SPEC, entropy=True))
    assert asking.missing(make_rows(1))


def test_an_empty_unit_has_the_columns_of_the_others(tmp_path):
    store = TargetStore(tmp_path, teacher=TEACHER, spec=SPEC)
    store.write(answer(make_rows(1)))
    empty = store.read(make_rows())
    empty.check(make_rows(), SPEC, TEACHER)
    assert empty.arrays().ids_NK.shape == (0, 4)
