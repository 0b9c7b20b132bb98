"""Runs that go on from a checkpoint with other ranks, another ZeRO stage, other micro-batches."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shared.run.plan import RunPlan
from student_trainer.state.checkpoint import (
    MANIFEST,
    draft_of,
    publish,
    read_state,
    write_state,
)
from student_trainer.state.resume import BASE
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains
from tests.telling import asked, telling

LORA = {"kind": "lora", "r": 4, "alpha": 8}
KINDS: dict[str, dict] = {"full": {"kind": "full"}, "lora": LORA, "qlora": LORA | {"kind": "qlora"}}
MIDDLE, END = 3, 6


@dataclass(frozen=True)
class Cut:
    """How a run is spread over ranks."""

    ranks: int
    zero: int
    micro_batch: int = 2

    @property
    def name(self) -> str:
        return f"{self.ranks}x{self.micro_batch}-zero{self.zero}"


@dataclass(frozen=True)
class Change:
    """A run that begins cut one way and goes on cut another way."""

    kind: str
    before: Cut
    after: Cut
    dtype: str = "float32"

    @property
    def begun(self) -> str:
        return f"{self.kind}-{self.dtype}-{self.before.name}"

    @property
    def name(self) -> str:
        return f"{self.begun}-to-{self.after.name}"


CHANGES = [
    Change("full", Cut(2, 2), Cut(1, 2)),
    Change("full", Cut(2, 2), Cut(2, 2, micro_batch=3)),
    Change("full", Cut(1, 0), Cut(2, 3)),
    Change("lora", Cut(2, 3), Cut(1, 1, micro_batch=4)),
    Change("qlora", Cut(1, 2), Cut(2, 0)),
]
SHOWN = (0, 2, 3)  # fewer ranks, more ranks and another stage, adapters
STAGES = range(4)
MANY = [
    *(Change("full", Cut(2, a), Cut(2, b)) for a in STAGES for b in STAGES if a != b),
    *(Change("full", Cut(1, a), Cut(2, a, micro_batch=1)) for a in STAGES),
    *(Change("full", Cut(2, a), Cut(1, a, micro_batch=6)) for a in STAGES),
    *(Change("full", Cut(2, a), Cut(3, b)) for a in STAGES for b in STAGES),
    *(Change("full", Cut(3, a), Cut(2, b)) for a in STAGES for b in STAGES),
    *(Change("full", Cut(2, a), Cut(1, b), "bfloat16") for a in STAGES for b in STAGES),
    *(Change(k, Cut(2, a), Cut(3, b)) for k in ("lora", "qlora") for a in STAGES for b in STAGES),
    *(Change("qlora", Cut(3, a), Cut(1, b), "bfloat16") for a in STAGES for b in STAGES),
]
every_change = pytest.mark.parametrize(
    "change",
    telling(dict.fromkeys([*CHANGES, *MANY]), *(CHANGES[n] for n in SHOWN)),
    ids=lambda change: change.name,
)


class Runs:
    """Runs that went through unchanged, and the same ones gone on with after a change."""

    def __init__(self, folder: Path, changes: list[Change]) -> None:
        self.folder = folder
        self.pair = tiny.save_pair(folder / "models", tied=False)
        self.domains = prepared_domains(folder)
        whole = {change.begun: change for change in changes}
        self._run({name: (change, change.before) for name, change in whole.items()})
        for change in changes:
            as_if_killed(folder / change.begun, folder / change.name)
            if change.kind == "lora":
                age(folder / change.name)
        self._run({change.name: (change, change.after) for change in changes})

    def _run(self, runs: dict[str, tuple[Change, Cut]]) -> None:
        for ranks in {cut.ranks for _, cut in runs.values()}:
            jobs = [
                as_job("train", self.plan(name, change, cut))
                for name, (change, cut) in runs.items()
                if cut.ranks == ranks
            ]
            where = self.folder / f"jobs-{ranks}-{len(list(self.folder.iterdir()))}"
            for result in run_jobs(jobs, where, ranks=ranks):
                assert result["error"] is None, result

    def plan(self, name: str, change: Change, cut: Cut, pair: tiny.Pair | None = None) -> RunPlan:
        """A run of this change, so cut."""
        plan = plan_of(
            self.folder / name,
            pair or self.pair,
            self.domains,
            steps=END,
            student={
                "train": KINDS[change.kind],
                "zero": cut.zero,
                "dtype": change.dtype,
                "workers": cut.ranks,
            },
            batch={"rows_per_step": 12, "micro_batch": cut.micro_batch},
            optimiser={"lr": 1e-3, "warmup_steps": 1, "weight_decay": 0.01},
            losses=[{"kind": "cross_entropy"}],
            checkpoints={"every": MIDDLE},
        )
        mark_exported(plan)
        return plan


def as_if_killed(done: Path, folder: Path) -> None:
    """What is on disk after a kill some time after the checkpoint in the middle."""
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{END:06d}")
    evaluations = json.loads((folder / "evaluations.json").read_text())
    (folder / "evaluations.json").write_text(json.dumps({"before": evaluations["before"]}))


def age(run: Path) -> None:
    """What a checkpoint was before it named the base of adapters whole."""
    folder = run / "checkpoints"
    checkpoint = folder / f"step-{MIDDLE:06d}"
    state = read_state(checkpoint)
    del state["facts"][BASE]
    write_state(checkpoint, state)
    (checkpoint / MANIFEST).unlink()
    publish(checkpoint.rename(draft_of(folder, MIDDLE)), step=MIDDLE, keep=9)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Those that are asked for."""
    return Runs(tmp_path_factory.mktemp("resharding"), asked(request, "change"))


@every_change
def test_a_changed_run_equals_the_unchanged_one_to_rounding(runs: Runs, change: Change) -> None:
    straight, changed = runs.folder / change.begun, runs.folder / change.name
    start, expected = weights_after(straight, MIDDLE), weights_after(straight, END)
    found = weights_after(changed, END)
    assert found.keys() == expected.keys()
    moved, off = (
        torch.cat([(weight - other[n]).float().abs().flatten() for n, weight in expected.items()])
        for other in (start, found)
    )
    assert off.mean() < (1e-5 if change.dtype == "float32" else 2e-2) * moved.mean()
    if change.dtype == "float32":  # in bfloat16 a weight's own rounding is as large as its step
        assert off.max() < 5e-3 * moved.max()


@every_change
def test_a_changed_run_draws_the_same_rows_and_measures_the_same_losses(
    runs: Runs, change: Change
) -> None:
    expected, found = (comparable_lines(runs.folder / name) for name in (change.begun, change.name))
    measured = 1e-5 if change.dtype == "float32" else 2e-3
    assert [line["step"] for line in found] == [MIDDLE, END]
    for line, other in zip(expected, found, strict=True):
        for name in ("tokens", "lr"):
            assert other[name] == line[name]
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=measured)
        for domain, of_it in line["domains"].items():
            assert other["domains"][domain]["sequences"] == of_it["sequences"]
            assert other["domains"][domain]["tokens"] == of_it["tokens"]


@pytest.mark.parametrize("change", [CHANGES[-1]], ids=["qlora"])
def test_adapters_do_not_go_on_another_base(runs: Runs, change: Change) -> None:
    folder = runs.folder / "another-base"
    as_if_killed(runs.folder / change.begun, folder)
    other = tiny.Pair(runs.pair.teacher, folder / "student")
    tiny.save_model(other.student, width=32, layers=2, tied=False, seed=9)
    plan = runs.plan(folder.name, change, change.after, other)
    (found,) = run_jobs([as_job("train", plan)], folder / "jobs", ranks=change.after.ranks)
    assert found["error"] == "CheckpointError"
    assert "was written with the base of the adapters" in found["message"]
