"""What a rank trains on next, and how far it must know the weight log."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.control.controller import Controller, ControllerPlan
from shared.config.mixture import DDKMixture, FixedMixture
from shared.data.rows import Rows
from shared.mixture.weight_log import DomainReport, WeightEntry
from shared.run.plan import RunPlan
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import Question
from shared.targets.reader import ReaderStats
from shared.targets.soft_targets import SoftTargets
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Batch, Layouts
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.loader import Loader
from student_trainer.sources.student_ids import StudentIds
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains


class SlowController(Controller):
    """Decides in time to be waited for and never earlier; says at which steps it was waited for."""

    def __init__(self, plan: ControllerPlan) -> None:
        super().__init__(plan)
        self.step, self.waits = 0, []

    def entry(self, index: int) -> WeightEntry:
        self.waits.append((self.step, index))
        return super().entry(index)

    def peek(self, index: int) -> WeightEntry | None:
        return None


MIXTURE = DDKMixture(interval=3, lag_steps=2)
DECISIONS = (0, 3)


def loader_of(
    plan: RunPlan, ranks: Ranks, controller: Controller, **options: Any
) -> tuple[Loader, FollowedLog]:
    """A loader of the data set's steps, by default one that asks no teacher, and its weight log."""
    log = FollowedLog(plan.config, ranks, controller)
    source = DataSet(plan, ranks, log)
    return Loader(source, log, ranks=ranks, domains=DOMAINS, **options), log


def eight_steps(
    kind: type[Controller], ranks: Ranks, pair: tiny.Pair, folder: Path
) -> tuple[Loader, FollowedLog, Controller]:
    """A loader of eight steps, its weight log, and the controller that decides it."""
    domains = prepared_domains(folder)
    plan = plan_of(folder / "run", pair, domains, steps=8, mixture=MIXTURE, student={"workers": 1})
    log_path = str(folder / "weight_log.jsonl")
    controller = kind(ControllerPlan(plan.config, (0.5, 0.5), log_path))
    return *loader_of(plan, ranks, controller), controller


def report(step: int) -> DomainReport:
    return DomainReport(step, (30.0, 20.0), (10, 10), (2.0, 1.5))


def test_a_checkpoint_waits_for_every_decision_before_it(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path
) -> None:
    loader, log, controller = eight_steps(SlowController, ranks, tiny_pair, tmp_path)
    known = []
    for step in range(8):
        if step in DECISIONS:
            controller.observe(report(step))
        loader.step(step)
        before = log.num_entries
        log.learn_decisions(before=step + 1)
        known.append((before, log.num_entries))
    assert known == [(1, 1)] * 3 + [(1, 2)] + [(2, 2)] * 4


def test_a_controller_that_decides_just_in_time_is_never_waited_for_before(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path
) -> None:
    loader, _, controller = eight_steps(SlowController, ranks, tiny_pair, tmp_path)
    assert isinstance(controller, SlowController)
    for step in range(8):
        controller.step = step
        if step in (0, DECISIONS[1] + MIXTURE.lag_steps):  # the first block that it rules
            controller.observe(report(DECISIONS[step > 0]))
        loader.step(step)
    assert controller.waits == [(0, 0), (5, 1)]


def test_how_fast_the_controller_is_changes_no_row(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path
) -> None:
    drawn = {}
    for kind in (Controller, SlowController):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        loader, _, controller = eight_steps(kind, ranks, tiny_pair, folder)
        steps = []
        for step in range(8):
            if step in DECISIONS:
                controller.observe(report(step))
            steps.append([unit.names() for unit in loader.step(step).units])
        drawn[kind] = steps
    assert drawn[Controller] == drawn[SlowController]


class Asked:
    """A reader that only remembers what it was asked."""

    def __init__(self) -> None:
        self.units: list[tuple[Rows, Question]] = []
        self.stats = ReaderStats()

    def submit(self, rows: Rows, spec: Question) -> None:
        self.units.append((rows, spec))

    def next(self) -> SoftTargets:
        raise AssertionError("nothing is answered here")

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("selector", "draws"), [("threshold", 2), ("sampled", 3), ("top_k", 2)])
def test_every_epoch_learns_from_another_draw(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path, selector: str, draws: int
) -> None:
    domains = prepared_domains(tmp_path)
    plan = plan_of(
        tmp_path / "run",
        tiny_pair,
        domains,
        steps=26,  # of 8 rows, of which both domains have 24
        student={"workers": 1},
        targets={"selector": selector, "draws": draws},
    )
    log_path = str(tmp_path / "weight_log.jsonl")
    controller = Controller(ControllerPlan(plan.config, (0.5, 0.5), log_path))
    reader = Asked()
    loader, _ = loader_of(plan, ranks, controller, reader=reader, question=plan.training_question)
    for step in range(26):
        loader.step(step)
    asked: dict[str, list[int]] = {}
    for rows, _ in reader.units:
        for name, number in zip(rows.names(), rows.draws().tolist(), strict=True):
            asked.setdefault(name, []).append(number)
    assert max(map(len, asked.values())) > 3
    for numbers in asked.values():
        drawn = selector != "top_k"
        expected = [epoch % draws if drawn else 0 for epoch in range(len(numbers))]
        assert sorted(numbers) == sorted(expected)  # a block may hold a row of two epochs


class Naming:
    """In an engine's place: names its number of steps so far, and then the next ids."""

    def __init__(self) -> None:
        self.steps, self.training = 0, True

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def __call__(self, batch: Batch, *, mode: str, asked: LikeliestIds) -> tuple[torch.Tensor]:
        assert not self.training
        ids_M = self.steps + torch.arange(asked.student_ids)
        return (ids_M.expand(len(batch["loss_index_N"]), -1),)


@pytest.mark.parametrize("mixture", [FixedMixture(), MIXTURE])
def test_a_step_is_asked_about_when_it_is_reached_with_the_student_of_then(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path, mixture: FixedMixture | DDKMixture
) -> None:
    domains = prepared_domains(tmp_path)
    plan = plan_of(
        tmp_path / "run",
        tiny_pair,
        domains,
        steps=4,
        mixture=mixture,
        student={"workers": 1},
        losses=[{"kind": "reverse_kl"}],
        targets={"student_ids": 3},
    )
    controller = Controller(ControllerPlan(plan.config, (0.5, 0.5), str(tmp_path / "log.jsonl")))
    reader, engine = Asked(), Naming()
    layouts = Layouts(DOMAINS, True, torch.device("cpu"), CAUSAL_LM)
    assert plan.training_question is not None
    assert plan.training_question.ask.num_ids == 16 + 3
    own = StudentIds(engine, layouts, plan.training_question.ask)
    asking: dict[str, Any] = {"reader": reader, "question": plan.training_question}
    loader, _ = loader_of(plan, ranks, controller, **asking, student_ids=own)
    for step in range(4):
        if step in plan.config.decision_steps:
            controller.observe(report(step))
        engine.steps = step
        drawn = loader.step(step)
        assert engine.training
        asked = [rows for rows, _ in reader.units]
        assert len(asked) == 4 * (step + 1), "no unit of a later step"
        for rows, unit in zip(asked[-4:], drawn.units, strict=True):
            assert rows.names() == unit.names()
            assert unit.student_ids() is None
            ids_NM = rows.student_ids()
            assert ids_NM is not None
            assert (ids_NM == step + np.arange(3)).all()
            assert len(ids_NM) == rows.num_loss_tokens().sum()
