"""The weight log on disk, and which step decides about which block."""

import os
from pathlib import Path

import pytest

from shared.errors import CheckpointError
from shared.mixture.weight_log import WeightEntry, WeightLog, read_log, write_entry

NAMES = ("math", "code")
FIRST = WeightEntry(0, 0, 0, (0.1 + 0.2, 0.7 - 1e-17), (1 / 3, 2 / 3))
SECOND = WeightEntry(1, 20, 22, (0.25, 0.75), phase=1, gap=0.1 + 0.2, stop=True)


def test_the_log_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    assert read_log(path, NAMES) == WeightLog(NAMES, ())
    for entry in (FIRST, SECOND):
        write_entry(path, NAMES, entry)
    assert read_log(path, NAMES) == WeightLog(NAMES, (FIRST, SECOND))


def test_weights_are_found_by_name_whatever_the_order_of_the_config(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    write_entry(path, NAMES, FIRST)
    (entry,) = read_log(path, NAMES[::-1]).entries
    assert entry.weights == FIRST.weights[::-1]
    assert entry.factors == (2 / 3, 1 / 3)


def test_a_torn_last_line_is_dropped_and_replaced_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    write_entry(path, NAMES, FIRST)
    first = path.read_bytes()
    write_entry(path, NAMES, SECOND)
    both = path.read_bytes()
    for cut in range(len(first), len(both)):
        path.write_bytes(both[:cut])
        assert read_log(path, NAMES).entries == (FIRST,)
        write_entry(path, NAMES, SECOND)
        assert path.read_bytes() == both


@pytest.mark.parametrize("lines_before", [0, 1, 3])
@pytest.mark.parametrize("torn_bytes", [1, 4095, 4096, 4097, 100_000])
def test_a_torn_line_of_any_length_is_replaced(
    tmp_path: Path, lines_before: int, torn_bytes: int
) -> None:
    path = tmp_path / "weight_log.jsonl"
    path.touch()
    entries = [WeightEntry(i, 20 * i, 20 * i, (0.5, 0.5)) for i in range(lines_before + 1)]
    for entry in entries[:-1]:
        write_entry(path, NAMES, entry)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b"x" * torn_bytes)
    write_entry(path, NAMES, entries[-1])
    assert path.read_bytes().startswith(whole)
    assert read_log(path, NAMES).entries == tuple(entries)


def test_an_append_reads_no_more_than_the_tail_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    with path.open("wb") as file:
        file.truncate(2**36)  # a hole on disk, more than fits in memory
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    write_entry(path, NAMES, FIRST)
    assert path.stat().st_size < 2**36 + 1000


def test_a_broken_line_before_the_last_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    write_entry(path, NAMES, FIRST)
    whole = path.read_bytes()
    for damage in (b"{}\n", b"null\n", b"[]\n", b"5\n"):
        path.write_bytes(damage + whole)
        with pytest.raises(CheckpointError, match=r"weight_log.jsonl, line 1, is no weight entry"):
            read_log(path, NAMES)
    path.write_bytes(whole + whole)
    with pytest.raises(CheckpointError, match=r"line 2, is no weight entry .* entry 1 is due"):
        read_log(path, NAMES)


def test_a_log_of_other_domains_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weight_log.jsonl"
    write_entry(path, NAMES, FIRST)
    with pytest.raises(CheckpointError, match="line 1, is no weight entry for math, law"):
        read_log(path, ("math", "law"))


def test_the_ruling_entry_is_the_last_one_in_effect() -> None:
    log = WeightLog(NAMES, (FIRST,)).appended(SECOND)
    assert [log.ruling(block).index for block in (0, 21, 22, 500)] == [0, 0, 1, 1]


def test_mean_weights_count_each_block_under_the_entry_that_rules_it() -> None:
    log = WeightLog(NAMES, (FIRST, SECOND))
    assert log.mean_weights(range(22)) == pytest.approx(FIRST.weights, abs=1e-15)
    assert log.mean_weights(range(22, 24)) == SECOND.weights
    expected = [(2 * a + 6 * b) / 8 for a, b in zip(FIRST.weights, SECOND.weights, strict=True)]
    assert log.mean_weights(range(20, 28)) == pytest.approx(expected, abs=1e-15)


def test_a_log_written_before_there_were_phases_is_read(tmp_path: Path) -> None:
    line = '{"index": 0, "decided_at": 0, "effective_from": 0, '
    line += '"weights": {"math": 0.25, "code": 0.75}, "factors": null}'
    (tmp_path / "log").write_text(line + "\n")
    (entry,) = read_log(tmp_path / "log", NAMES).entries
    assert (entry.phase, entry.gap, entry.stop) == (0, None, False)


def test_a_stop_ends_the_run_at_its_block_but_never_before_the_step_under_way() -> None:
    log = WeightLog(NAMES, (FIRST, WeightEntry(1, 20, 22, (0.5, 0.5))))
    assert log.end(100) == 100
    assert log.appended(WeightEntry(2, 40, 42, (0.5, 0.5), stop=True)).end(100) == 42
    assert log.appended(WeightEntry(2, 40, 40, (0.5, 0.5), stop=True)).end(100) == 41
    assert log.appended(WeightEntry(2, 40, 42, (0.5, 0.5), stop=True)).end(30) == 30
