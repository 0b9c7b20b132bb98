"""What `selftest` examines, with a teacher in this process whose answers are changed on the way."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.planning.preparation import Prepared, run_plan
from cluster.selftest.checks import Check
from cluster.selftest.subject import Subject, subject_of
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.hf import HFEngine
from tests.answers import Given, decoded, encoded
from tests.student_trainer.processes import LocalTeacher

Change = Callable[[Given], Given]


class Altered(LocalTeacher):
    """A teacher in this process whose answers are changed on the way."""

    def __init__(self, engine: HFEngine, change: Change) -> None:
        super().__init__(engine)
        self._engine, self._change = engine, change

    def next(self) -> SoftTargets:
        rows, spec = self._asked.popleft()
        found = self._engine.score(rows, spec)
        return SoftTargets.build(
            question=spec,
            teacher=found.described["teacher"],
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=encoded(spec, self._change(decoded(found))),
        )


def subject(prepared: Prepared, change: Change = lambda arrays: arrays) -> Subject:
    engine = HFEngine.load(prepared.teacher.model)
    plan = run_plan(prepared, run_dir=Path(), teacher=engine.fingerprint)
    return subject_of(plan, lambda rank: Altered(engine, change))


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def verdicts(found: Iterable[Check]) -> dict[str, bool]:
    """Of the checks that have one."""
    return {check.name: check.ok for check in found if check.ok is not None}


def looked_at(said: str) -> dict[str, list[str]]:
    """The losses whose value and gradient a sentence speaks of."""
    found = re.findall(r"(value|gradient) [\d.e+-]+ \((.*?)\)", said)
    return {what: names.split(", ") for what, names in found}
