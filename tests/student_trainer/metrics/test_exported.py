"""A line of `metrics.jsonl` as exported gauges."""

from dataclasses import replace

import pytest

from shared.config.run import Config
from shared.run import exported, exporter
from shared.run.metrics import DomainMetrics
from student_trainer.metrics.exported import export_line, measured
from tests.shared.run.test_exported import Instruments
from tests.shared.run.test_metrics import line

PARTS = (
    exported.STEP_WAIT,
    exported.STEP_WRITING,
    exported.STEP_COMPUTE,
    exported.STEP_OPTIMISER,
    exported.STEP_REST,
)
CONFIG = Config.model_validate(
    {
        "name": "run",
        "steps": 4,
        "teachers": {"t": {"model": "m"}},
        "student": {"model": "m"},
        "domains": {"code": {"train": "x.jsonl"}},
    }
)


def test_the_parts_of_a_step_add_up_to_it_whatever_it_waits_for():
    told = replace(
        line(4),
        seconds=2.0,
        teacher_wait_s=0.1,
        writing_s=0.4,
        writing_wait_s=0.3,
        compute_s=0.5,
        optimiser_s=0.2,
        balancing_s=0.4,
    )
    value = {metric: found for metric, _, found in measured(told, CONFIG, steps_in_line=2)}
    parts = [value[part] for part in PARTS]
    assert parts == pytest.approx([0.05, 0.15, 0.25, 0.1, 0.45])
    assert sum(part or 0 for part in parts) == pytest.approx(value[exported.STEP_TIME])


def test_a_domain_that_is_done_has_a_weight_of_0_once_and_then_none():
    library = Instruments()
    with exporter.exporting(library, run="run"):
        for weight in (0.5, 0.0, 0.0):
            domain = DomainMetrics(kl=0.1, tokens=8, sequences=1, weight=weight)
            export_line(replace(line(4), domains={"code": domain}), CONFIG, steps_in_line=2)
        exporter.current().refresh()
    seen = [value for metric, value, _ in library.written if metric == exported.WEIGHT.name]
    assert list(dict.fromkeys(seen)) == [0.5, 0.0]
    assert seen.count(0.0) == 1
