"""Laws of the files of a store: they read back as written, and damage is always found."""

import os

import numpy as np
import pyarrow as pa
import pytest

from shared.errors import DamagedError
from shared.locations import Location
from shared.store.answer_files import (
    CommittedBatch,
    Holding,
    check_file,
    open_file,
    open_reader,
    question_key,
    rewritten,
    write_file,
)
from tests.shared.store.test_target_store import SPEC, TEACHER, answer, make_rows

KEY = question_key(TEACHER, SPEC)
NUM_CHANGED = 400  # bytes of one file, each alone


def record(*indices: int, seed: int = 0) -> pa.RecordBatch:
    return answer(make_rows(*indices), seed=seed).table.combine_chunks().to_batches()[0]


def test_a_file_holds_its_batches_and_says_which_rows_they_answer(tmp_path):
    written = [record(1, 2), record(3)]
    file = write_file(Location.of(tmp_path), [CommittedBatch(r, n) for n, r in enumerate(written)])
    size = os.path.getsize(file.place.path)
    again = open_file(file.place, size=size, question=KEY)
    assert again.facts == file.facts
    assert [batch.keys for batch in again.facts] == [
        tuple(make_rows(1, 2).hashes()),
        tuple(make_rows(3).hashes()),
    ]
    reader = open_reader(file.place)
    for number, batch in enumerate(written):
        assert again.batch(number, reader).equals(batch, check_metadata=True)
    tokens = int(make_rows(1, 2, 3).num_loss_tokens().sum())
    assert Holding.of([again]) == Holding(3, tokens, size)
    assert pa.ipc.open_file(file.place.path).read_all().num_rows == 3  # as any Arrow tool does


def test_a_file_with_any_byte_changed_is_refused_or_reads_as_it_was_written(tmp_path):
    written = [record(1, 2), record(3)]
    file = write_file(Location.of(tmp_path), [CommittedBatch(r, n) for n, r in enumerate(written)])
    path, whole = file.place.local, file.place.read()
    harmless = 0
    for at in np.random.default_rng(0).choice(len(whole), NUM_CHANGED, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(DamagedError, match="checksum of the file"):
            check_file(file.place, question=KEY)
        try:
            again = open_file(file.place, size=len(whole), question=KEY)
            reader = open_reader(file.place)
            found = [again.batch(number, reader) for number in range(2)]
        except DamagedError:
            continue
        harmless += 1  # padding, or the copy of the schema that no reader needs
        assert all(f.equals(w, check_metadata=True) for f, w in zip(found, written, strict=True))
        assert again.facts == file.facts
    assert harmless < NUM_CHANGED / 2


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, part):
    file = write_file(Location.of(tmp_path), [CommittedBatch(record(1, 2), 0)])
    whole = file.place.read()
    file.place.local.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DamagedError, match=r"\.arrow is damaged or no file of answers"):
        open_file(file.place, size=0, question=KEY)


def test_a_file_of_another_teacher_or_tool_is_refused(tmp_path):
    file = write_file(Location.of(tmp_path), [CommittedBatch(record(1), 0)])
    other = question_key(TEACHER | {"weights": "1"}, SPEC)
    with pytest.raises(DamagedError, match="another question or of another teacher"):
        open_file(file.place, size=0, question=other)
    table = pa.table({"x": [1]})
    with pa.ipc.new_file(str(file.place.path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DamagedError):
        open_file(file.place, size=0, question=KEY)


def test_rewriting_keeps_every_answer_but_the_rows_left_out(tmp_path):
    folder = Location.of(tmp_path)
    files = [write_file(folder, [CommittedBatch(record(n, n + 10, seed=n), n)]) for n in range(3)]
    (joined,) = rewritten(folder, files, without={(files[1].name, 0, 1)})
    check_file(joined.place, question=KEY)
    assert [batch.written_at for batch in joined.facts] == [0, 1, 2]
    reader = open_reader(joined.place)
    assert joined.batch(0, reader).equals(record(0, 10, seed=0), check_metadata=True)
    assert joined.batch(1, reader).equals(record(1, 11, seed=1).slice(0, 1), check_metadata=True)
