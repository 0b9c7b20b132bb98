"""The lines of metrics.jsonl: the last attempt wins, and a torn line costs itself alone."""

import json
from dataclasses import asdict, replace

import pytest

from shared.run.metrics import (
    DomainMetrics,
    StepMetrics,
    append_metrics,
    drop_metrics_after,
    read_metrics,
)


def line(step: int, *, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step, loss=loss, lr=0.1, grad_norm=1.0, tokens=8, captured_mass=None)


def test_lines_come_back_in_step_order_and_the_last_attempt_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for written in (line(2, loss=3.0), line(1), line(2, loss=2.0)):
        append_metrics(path, written)
    assert read_metrics(path) == [line(1), line(2, loss=2.0)]


def test_a_line_torn_by_a_full_disk_costs_no_other_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, line(1))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    append_metrics(path, line(3))
    assert read_metrics(path) == [line(1), line(3)]


def test_a_line_that_a_disk_damaged_costs_no_other_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, line(step))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'\xff\xfe\x80"' + lines[1][4:] + lines[2])
    assert read_metrics(path) == [line(1), line(3)]
    drop_metrics_after(path, 2)
    assert path.read_bytes() == lines[0]


def test_lines_written_before_token_adaptive_losses_still_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    domain = {"kl": 0.5, "tokens": 8, "sequences": 1, "weight": 1.0}
    path.write_text(json.dumps({**asdict(line(1)), "domains": {"code": domain}}) + "\n")
    (found,) = read_metrics(path)
    assert found.domains["code"] == DomainMetrics(**domain)
    assert found.domains["code"].hard_share is None


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, line(step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    drop_metrics_after(path, 2)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]
    drop_metrics_after(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_the_parts_of_a_step_add_up_to_it():
    timed = replace(line(1), seconds=2.0, teacher_wait_s=0.25, compute_s=1.0, optimiser_s=0.5)
    assert timed.rest_s == 0.25
    assert replace(timed, optimiser_s=0.8).rest_s == 0  # clocks differ by a little
    written = replace(timed, writing_s=0.125, teacher_writing_s=0.0625)
    assert (written.text_wait_s, written.rest_s) == (0.1875, 0.0625)
    aside = replace(written, writing_wait_s=0.05)
    assert (aside.text_wait_s, aside.rest_s) == (0.05, pytest.approx(0.2))
