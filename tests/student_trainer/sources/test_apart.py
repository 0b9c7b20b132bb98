"""Blocks that others write: learnt in turn, written meanwhile, and failed together."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import TeacherError
from shared.run.plan import RunPlan
from student_trainer import waiting as waits
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.loader import Loader
from student_trainer.sources.source import Drawn
from student_trainer.torchrun import StandingWeights
from student_trainer.waiting import waiting
from tests import tiny
from tests.answers import question_of
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains
from tests.student_trainer.sources.test_loader import Asked

PATIENCE_S = 20.0


class Written:
    """The data set, as text that others write from the moment that a step is learnt."""

    fixed = True

    def __init__(
        self, plan: RunPlan, ranks: Ranks, weight_log: FollowedLog, *, lag: int = 1
    ) -> None:
        self.ahead = lag
        self.data_set = DataSet(plan, ranks, weight_log)
        self.learnt = [threading.Event() for _ in range(plan.config.steps)]
        self.written: list[int] = []

    def draw(self, step: int) -> Callable[[], Drawn]:
        drawn = replace(self.data_set.draw(step), counts=None)

        def finish() -> Drawn:
            before = step - self.ahead
            if before >= 0 and not self.learnt[before].wait(PATIENCE_S):
                raise TeacherError(f"step {before + 1} is not learnt while {step + 1} is written")
            self.written.append(step)
            return drawn

        return finish

    def epochs(self, steps: int) -> tuple[float, ...]:
        return self.data_set.epochs(steps)

    def facts(self) -> dict:
        return {}


@pytest.fixture
def plan(tiny_pair: tiny.Pair, tmp_path: Path) -> RunPlan:
    domains = prepared_domains(tmp_path)
    return plan_of(tmp_path / "run", tiny_pair, domains, steps=4, student={"workers": 1})


def opened(plan: RunPlan, ranks: Ranks, *, lag: int = 1, **options) -> tuple[Written, Loader]:
    log = FollowedLog(plan.config, ranks, StandingWeights(plan))
    source = Written(plan, ranks, log, lag=lag)
    return source, Loader(source, log, ranks=ranks, domains=DOMAINS, **options)


def test_a_step_is_learnt_while_the_next_is_written_and_asked_about(ranks: Ranks, plan: RunPlan):
    """One beyond the last is written, for a run that takes more steps, and not asked about."""
    reader = Asked()
    source, loader = opened(plan, ranks, reader=reader, question=question_of(4, tiny.VOCAB))
    waited: list[int] = []
    loader._waiting = lambda step: waited.append(step) or nullcontext()
    for step in range(4):
        drawn = loader.step(step)
        assert source.written == [*range(step + 1)]
        asked = len(reader.units)
        source.learnt[step].set()
        loader.settle()
        assert source.written == [*range(step + 2)]
        assert len(reader.units) == asked + (len(drawn.units) if step < 3 else 0)
    assert waited == [0, 1, 2, 3, 4]


def test_a_step_waits_for_its_own_block_and_not_for_those_after_it(ranks: Ranks, plan: RunPlan):
    """Blocks of as many steps as the lag has are under way, and are written in their order."""
    source, loader = opened(plan, ranks, lag=2)
    loader.step(0)
    loader.step(1)  # block 2 waits until step 0 is learnt, and block 3 for block 2
    assert source.written == [0, 1]
    source.learnt[1].set()
    source.learnt[0].set()
    loader.settle()
    assert source.written == [0, 1, 2, 3]


def test_blocks_in_turn_are_begun_when_those_before_them_are_written(
    ranks: Ranks, plan: RunPlan, monkeypatch
):
    monkeypatch.setattr("tests.student_trainer.sources.test_apart.PATIENCE_S", 0.0)
    _, loader = opened(plan, ranks, lag=2, in_turn=True)
    loader.step(0)
    with pytest.raises(TeacherError, match="step 1 is not learnt while 3 is written"):
        loader.step(1)


def test_what_fails_fails_where_its_step_is_waited_for(ranks: Ranks, plan: RunPlan, monkeypatch):
    monkeypatch.setattr("tests.student_trainer.sources.test_apart.PATIENCE_S", 0.0)
    source, loader = opened(plan, ranks)
    source.learnt[0].set()
    loader.step(0)
    loader.step(1)
    with pytest.raises(TeacherError, match="step 2 is not learnt while 3 is written"):
        loader.step(2)
    loader.close()


def test_a_long_wait_is_said_again_and_again(monkeypatch):
    monkeypatch.setattr(waits, "SAY_S", 0.02)
    said: list[str] = []
    twice = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            twice.set()
        raise OSError("no space left")

    with waiting("the test waits", say):
        assert twice.wait(PATIENCE_S)
    assert said[:2] == ["the test waits for 0 s", "the test waits for 0 s"]
    with waiting("it does not", said.append):
        pass
    assert "it does not" not in said[-1]
