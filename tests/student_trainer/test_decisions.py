"""Weights decided from training text: sums of all ranks, and the same bits after a resume."""

from pathlib import Path

import numpy as np
import pytest

from shared.mixture.weight_log import WeightLog, read_log
from shared.run.metrics import read_metrics
from tests import tiny
from tests.student_trainer.comparing import comparable_lines
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, plan_of, prepared_domains
from tests.telling import asked, telling

POLICIES = ("doremi", "odm")
STEPS, INTERVAL = 8, 2


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under each policy, and each again from a checkpoint between two decisions."""
    folder = tmp_path_factory.mktemp("decisions")
    domains, pair = prepared_domains(folder), tiny.save_pair(folder / "pair")
    jobs = []
    for policy in asked(request, "policy", always=("odm",)):
        plan = plan_of(
            folder / policy,
            pair,
            domains,
            steps=STEPS,
            log_every=1,
            checkpoints={"every": 3, "keep": 9},
            mixture={"policy": policy, "interval": INTERVAL, "lag_steps": 1},
        )
        mark_exported(plan)
        jobs.append(as_job("decided", plan, at=3))
    run_jobs(jobs, folder / "jobs")
    return folder


def _log(run: Path) -> WeightLog:
    return read_log(run / "weight_log.jsonl", DOMAINS)


@pytest.mark.parametrize("policy", telling(POLICIES, "odm"))
def test_a_resumed_run_decides_the_same_bits(runs: Path, policy: str) -> None:
    straight, resumed = runs / policy, runs / f"{policy}-resumed"
    log = _log(straight)
    assert [entry.decided_at for entry in log.entries] == list(range(0, STEPS - 1, INTERVAL))
    assert len({entry.weights for entry in log.entries}) > 2
    assert _log(resumed) == log
    assert comparable_lines(resumed)[1:] == comparable_lines(straight)[3:]


def test_the_reward_of_odm_is_the_mean_kl_of_the_steps_before(runs: Path) -> None:
    log, lines = _log(runs / "odm"), read_metrics(runs / "odm" / "metrics.jsonl")
    reward_D = np.zeros(len(DOMAINS))
    for before, entry in zip(log.entries, log.entries[1:], strict=False):
        seen = lines[before.decided_at : entry.decided_at]
        tokens_D = np.array([sum(s.domains[name].tokens for s in seen) for name in DOMAINS])
        sums = [sum((s.domains[n].kl or 0) * s.domains[n].tokens for s in seen) for n in DOMAINS]
        kl_D = np.array(sums) / tokens_D
        drawn = [log.ruling(block).weights for block in range(before.decided_at, entry.decided_at)]
        reward_D = 0.9 * reward_D + 0.1 * kl_D / np.mean(drawn, axis=0)
        np.testing.assert_allclose(entry.factors, reward_D, rtol=1e-9)
