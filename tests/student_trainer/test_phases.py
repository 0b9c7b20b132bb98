"""Runs through phases and up to a stop, on two ranks: the same rows and bits after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from shared.mixture.weight_log import WeightLog, read_log
from shared.run.metrics import StepMetrics, read_metrics
from student_trainer.torchrun import read_plan
from tests import tiny
from tests.student_trainer.comparing import comparable_lines
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import (
    DOMAINS,
    mark_exported,
    plan_of,
    prepared_domains,
    with_orders,
)

STEPS, INTERVAL, LAG = 14, 3, 2
HIDDEN = {"kind": "hidden_states", "layers": {3: 2}, "weight": 0.2, "final_weight": 0.0}
DDK = {"policy": "ddk", "interval": INTERVAL, "lag_steps": LAG}
# Phases change from blocks 5 and 11 by the number of steps, from 8 and 11 by a plateau, which is
# certain here; each run resumes between its first such decision and its effect.
PHASED = {
    "by_steps": ({"max_steps": 5, "plateau": None}, DDK, 4),
    "by_plateau": ({"plateau": 0.99, "patience": 1, "interval": INTERVAL}, {"policy": "fixed"}, 7),
}
BEGUN = {"by_steps": [0, 5, 11], "by_plateau": [0, 8, 11]}
STOP_LAGS = (0, 1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs through phases, each resumed; runs that stop; a stopping run, resumed."""
    folder = tmp_path_factory.mktemp("phases")
    domains = with_orders(prepared_domains(folder), folder)
    pair, jobs = tiny.save_pair(folder / "pair"), []

    def plan(name: str, *, end: int, **options: object) -> dict:
        settings = {"steps": STEPS, "log_every": 1, "checkpoints": {"every": 1, "keep": 99}}
        made = plan_of(folder / name, pair, domains, **(settings | options))
        mark_exported(made, step=end)
        return {"plan": made}

    for name, (progressive, mixture, at) in PHASED.items():
        options = {"progressive": progressive, "mixture": mixture}
        losses = [{"kind": "forward_kl"}, HIDDEN]
        jobs.append(as_job("decided", **plan(name, end=STEPS, losses=losses, **options), at=at))
    for lag in STOP_LAGS:
        mixture = DDK | {"lag_steps": lag, "stop_ratio": 1e9}
        end = INTERVAL + max(1, lag)
        often = {"log_every": 100, "checkpoints": {"every": 100}}
        jobs.append(as_job("stopped", **plan(f"stop-{lag}", end=end, mixture=mixture, **often)))
    mixture = DDK | {"stop_ratio": 1e9}
    jobs.append(as_job("decided", **plan("stop", end=5, mixture=mixture), at=4))
    results = run_jobs(jobs, folder / "jobs")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def _log(run: Path) -> WeightLog:
    return read_log(run / "weight_log.jsonl", DOMAINS)


def _lines(run: Path) -> list[StepMetrics]:
    return read_metrics(run / "metrics.jsonl")


def _weights(run: Path) -> dict:
    (path,) = (run / "checkpoints" / f"step-{STEPS:06d}" / "weights").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", PHASED)
def test_a_run_goes_through_its_phases_and_says_so(runs: Path, name: str) -> None:
    log, lines = _log(runs / name), _lines(runs / name)
    phases = [entry.phase for entry in log.entries]
    begun = [log.entries[phases.index(phase)].effective_from for phase in range(3)]
    assert begun == BEGUN[name]
    expected = [sum(step > first for first in begun) - 1 for step in range(1, STEPS + 1)]
    assert [line.phase for line in lines] == expected
    assert all(entry.gap is not None for entry in log.entries[1:])
    assert "step 6/14 | phase 2/3 |" in (runs / "by_steps" / "logs" / "progress.log").read_text()


@pytest.mark.parametrize("name", PHASED)
def test_a_run_resumed_between_a_decision_and_its_effect_is_the_same(runs: Path, name: str) -> None:
    straight, resumed, at = runs / name, runs / f"{name}-resumed", PHASED[name][2]
    assert _log(resumed) == _log(straight)
    assert comparable_lines(resumed)[1:] == comparable_lines(straight)[at:]
    weights, again = _weights(straight), _weights(resumed)
    assert weights.keys() == again.keys()
    assert all((weights[key] == again[key]).all() for key in weights)


def test_the_loss_adds_up_with_the_weight_of_its_phase(runs: Path) -> None:
    for name in PHASED:
        for line in _lines(runs / name):
            weight = (0.2, 0.1, 0.0)[line.phase or 0]
            expected = line.terms["forward_kl"] + weight * line.terms["hidden_states"]
            assert line.loss == pytest.approx(expected, rel=1e-5)


def test_epochs_count_rows_drawn_over_rows(runs: Path) -> None:
    for name in PHASED:
        drawn_D = np.zeros(len(DOMAINS))
        for line in _lines(runs / name):
            drawn_D += [line.domains[domain].sequences for domain in DOMAINS]
            epochs = [line.domains[domain].epochs for domain in DOMAINS]
            np.testing.assert_allclose(epochs, drawn_D / 24)


@pytest.mark.parametrize("lag", STOP_LAGS)
def test_a_student_near_its_teacher_ends_training_and_the_run_knows(runs: Path, lag: int) -> None:
    run, end = runs / f"stop-{lag}", INTERVAL + max(1, lag)
    entries = _log(run).entries
    assert [entry.stop for entry in entries] == [False, True]
    assert [line.step for line in _lines(run)] == [end]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{end:06d}"]
    results = json.loads((runs / "results.json").read_text())
    assert results[len(PHASED) + STOP_LAGS.index(lag)] == {"finished": True, "same": True}
    said = (run / "logs" / "progress.log").read_text()
    assert f"stopped after step {end}/{STEPS}: the student's perplexity was at most 1e+09" in said


def test_a_run_resumed_between_the_stop_and_its_effect_stops_there_too(runs: Path) -> None:
    straight, resumed = runs / "stop", runs / "stop-resumed"
    assert _log(resumed) == _log(straight)
    assert [line.step for line in _lines(straight)] == [1, 2, 3, 4, 5]
    assert comparable_lines(resumed)[1:] == comparable_lines(straight)[4:]


def test_a_plan_with_orders_survives_its_file(runs: Path) -> None:
    job = json.loads((runs / "jobs" / "jobs.json").read_text())[0]
    (runs / "plan.json").write_text(json.dumps(job["plan"]))
    plan = read_plan(runs / "plan.json")
    assert [d.order_path for d in plan.domains] == [str(runs / f"{n}.order.npy") for n in DOMAINS]
