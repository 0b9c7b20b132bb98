"""Reports to the controller are made where somebody decides from them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from student_trainer.evaluation.reports import report
from tests import tiny
from tests.student_trainer.runs import plan_of, prepared_domains


def test_where_weights_are_replayed_no_report_is_made(tmp_path: Path):
    plan = plan_of(
        tmp_path,
        tiny.save_pair(tmp_path / "pair"),
        prepared_domains(tmp_path),
        mixture={"policy": "ddk", "interval": 2, "lag_steps": 1},
    )

    def bare(replays: bool) -> Any:
        """A run of the plan that can neither evaluate a student nor reach a controller."""
        return SimpleNamespace(plan=replace(plan, replays=replays), config=plan.config)

    report(bare(replays=True), 2)
    with pytest.raises(AttributeError, match="validation"):
        report(bare(replays=False), 2)
