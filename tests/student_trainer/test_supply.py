"""What a rank trains on next, and how far it must know the weight log."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.controller import Controller, ControllerPlan
from shared.config_mixture import DDKMixture
from shared.domains import DomainReport
from shared.row_store import RowStore
from student_trainer.ranks import Ranks
from student_trainer.supply import Supply
from tests import tiny
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """One rank on its own."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def test_a_checkpoint_waits_for_every_decision_before_it(
    ranks: Ranks, tiny_pair: tiny.Pair, tmp_path: Path
) -> None:
    mixture = DDKMixture(interval=2, lag_steps=2)
    domains = prepared_domains(tmp_path)
    plan = plan_of(
        tmp_path / "run", tiny_pair, domains, steps=8, mixture=mixture, student={"workers": 1}
    )
    log_path = str(tmp_path / "weight_log.jsonl")
    controller = Controller(ControllerPlan(mixture, DOMAINS, (0.5, 0.5), log_path))
    stores = [RowStore.open(domain.train_path) for domain in domains]
    supply = Supply(plan, stores, ranks=ranks, reader=None, controller=controller)
    known = []
    for step in range(8):
        if step in (0, 2, 4):
            controller.observe(DomainReport(step, (30.0, 20.0), (10, 10), (2.0, 1.5)))
        supply.step(step)
        before = supply.num_weight_entries
        supply.learn_decisions(before=step + 1)
        known.append((before, supply.num_weight_entries))
    assert known == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 3), (3, 3)]
