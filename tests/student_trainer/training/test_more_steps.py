"""Runs that are to take more steps than they were begun with, finished or not."""

import json
from pathlib import Path

import pytest

from shared.mixture.weight_log import read_log
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from student_trainer.state.export import exported_step
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, plan_of, prepared_domains
from tests.telling import asked, telling

SHORT, LONG = 4, 8
# One decision of the longer run lies before the end of the shorter one, which has no use for them.
POLICIES = telling(("odm", "doremi", "sheared"), "odm")
INTERVAL, LAG = 2, 2
# What a student writes that is older than its weights, by its workers or by a copy of it.
WRITTEN: dict[str, dict[str, object]] = {
    f"{who}-{lag}": {
        "source": {"student": 0.5, "dataset": 0.5, "max_new_tokens": 6, "lag": lag} | more,
        "losses": [{"kind": "jsd"}],
        "rollouts": {"replicas": int(who == "copy")},
    }
    for who, lag, more in (("own", 1, {}), ("own", 2, {"updates": 5}), ("copy", 2, {}))
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run, a short one that becomes as long, and adaptive ones that become longer."""
    folder = tmp_path_factory.mktemp("more")
    domains, pair = prepared_domains(folder), tiny.save_pair(folder / "pair")

    def plan(name: str, *, steps: int, exported: int | None = None, **options: object) -> RunPlan:
        made = plan_of(
            folder / name,
            pair,
            domains,
            steps=steps,
            log_every=2,
            checkpoints={"every": SHORT},
            optimiser={"schedule": "constant"},
            **options,
        )
        mark_exported(made, step=exported)
        return made

    adaptive = {
        policy: {"mixture": {"policy": policy, "interval": INTERVAL, "lag_steps": LAG}}
        for policy in asked(request, "policy")
    }
    several = {"": {}} | {n: WRITTEN[n] for n in asked(request, "written") if n}
    jobs = [as_job("train", plan(f"long{n}", steps=LONG, **o)) for n, o in several.items()]
    jobs += [as_job("train", plan(f"grown{n}", steps=SHORT, **o)) for n, o in several.items()]
    jobs += [as_job("controlled", plan(p, steps=SHORT, **o)) for p, o in adaptive.items()]
    run_jobs(jobs, folder / "jobs-short")
    evaluations = json.loads((folder / "grown" / "evaluations.json").read_text())
    before = json.dumps({"before": evaluations["before"]})
    (folder / "after.json").write_text((folder / "grown" / "evaluations.json").read_text())
    for policy in adaptive:  # as if their export was of fewer steps
        (folder / policy / "evaluations.json").write_text(before)
    jobs = [
        as_job("train", plan(f"grown{n}", steps=LONG, exported=SHORT, **o))
        for n, o in several.items()
    ]
    jobs += [as_job("controlled", plan(p, steps=LONG, **o)) for p, o in adaptive.items()]
    run_jobs(jobs, folder / "jobs-long")
    jobs = [as_job("train", plan("grown", steps=SHORT, exported=LONG))]
    (found,) = run_jobs(jobs, folder / "jobs-fewer")
    (folder / "fewer.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("written", telling(["", *WRITTEN], "", "own-2"))
def test_a_finished_run_that_takes_more_steps_is_the_longer_run(runs: Path, written: str) -> None:
    grown, long = runs / f"grown{written}", runs / f"long{written}"
    weights, expected = weights_after(grown, LONG), weights_after(long, LONG)
    assert all((weights[name] == weight).all() for name, weight in expected.items())
    assert comparable_lines(grown) == comparable_lines(long)


def test_the_export_is_of_the_last_step(runs: Path) -> None:
    assert exported_step(runs / "grown" / "export") == LONG
    assert (runs / "grown" / "export" / "model.safetensors").exists()


def test_what_was_evaluated_after_fewer_steps_is_evaluated_again(runs: Path) -> None:
    short, grown, long = (
        json.loads(path.read_text())
        for path in (
            runs / "after.json",
            runs / "grown" / "evaluations.json",
            runs / "long" / "evaluations.json",
        )
    )
    assert grown == long
    assert short["before"] == grown["before"]
    assert short["after"] != grown["after"]


@pytest.mark.parametrize("policy", POLICIES)
def test_decisions_that_a_shorter_run_had_no_use_for_are_made_up_for(
    runs: Path, policy: str
) -> None:
    entries = read_log(runs / policy / "weight_log.jsonl", DOMAINS).entries
    assert [entry.decided_at for entry in entries] == list(range(0, LONG - LAG, INTERVAL))
    seen = [(entry.weights, entry.factors, entry.gap) for entry in entries]
    assert seen[2] != seen[1]
    assert read_metrics(runs / policy / "metrics.jsonl")[-1].step == LONG


def test_fewer_steps_than_are_done_are_refused_with_both_numbers(runs: Path) -> None:
    found = json.loads((runs / "fewer.json").read_text())
    assert found["error"] == "ConfigError"
    assert f"steps is {SHORT}, but {LONG} steps of this run are done" in found["message"]
