"""N steps of the trainer are N steps of a plain loop, whatever the options, ZeRO stage and ranks.

Every option of the optimiser is off its default, and a step's micro-batches have unequal numbers
of loss tokens. All rows are drawn at every step, so that the loop need not know their order.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from shared.data.prepared import PreparedDomain
from shared.data.row_store import RaggedRows, write_rows
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from tests import tiny
from tests.student_trainer.comparing import weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import Outcome, plain_loop
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, ragged_rows, with_states

STEPS, ROWS = 6, 12
OPTIMISER = {
    "lr": 5e-3,
    "betas": (0.7, 0.8),
    "eps": 1e-3,  # large beside rounding, which Adam would make steps of
    "weight_decay": 0.3,
    "warmup_steps": 2,
    "final_lr_fraction": 0.3,
    "clip_norm": 0.1,
}
KL2 = {"kind": "forward_kl", "temperature": 2.0, "weight": 0.7}
TEXT = {"kind": "cross_entropy", "weight": 0.4}
TAID = {
    "kind": "taid",
    "weight": 0.5,
    "temperature": 1.5,
    "t_start": 0.2,
    "t_end": 0.9,
    "alpha": 0.3,
    "beta": 0.6,
}
LOSSES: dict[str, list[dict]] = {
    "text": [TEXT],
    "dense": [KL2],
    "states": [KL2],  # the teacher's last states and head in place of ids
    "bucketed": [KL2 | {"times_temperature_squared": False}, TEXT],
    "taid": [TAID, TEXT],
}
KEPT = {"bucketed": 16}  # ids per position; all others see the whole vocabulary
LORA = {"kind": "lora", "r": 3, "alpha": 7.0}


@dataclass(frozen=True)
class Cell:
    """One run."""

    losses: str
    schedule: str = "cosine"
    zero: int = 0
    ranks: int = 2
    train: str = "full"
    clips: bool = True
    tied: bool = False

    @property
    def name(self) -> str:
        parts = [self.losses, self.schedule, f"zero{self.zero}", f"{self.ranks}ranks", self.train]
        return "-".join([*parts, "clip" if self.clips else "free", "tied" if self.tied else "own"])


CELLS = (
    Cell("text", "cosine", zero=0, tied=True),
    Cell("dense", "linear", zero=1),
    Cell("taid", "constant", zero=2, clips=False),
    Cell("states", "cosine", zero=3),
    Cell("bucketed", "linear", zero=3, tied=True),
    Cell("dense", "linear", zero=0, clips=False),
    Cell("text", "cosine", zero=2, train="lora"),
)
EVERY_CELL = tuple(
    Cell(losses, schedule, zero, ranks, train, clips)
    for losses, schedule, zero, ranks, (train, clips) in itertools.product(
        ("text", "dense"),
        ("constant", "linear", "cosine"),
        range(4),
        (1, 2),
        (("full", True), ("full", False), ("lora", True)),
    )
) + tuple(
    Cell(losses, zero=zero, ranks=ranks, tied=True)
    for losses, zero, ranks in itertools.product(("states", "bucketed", "taid"), range(4), (1, 2))
)


@dataclass(frozen=True, eq=False)
class Scene:
    """Models and rows on disk, and the rows as they are."""

    folder: Path
    train: RaggedRows
    validation: RaggedRows
    domain: PreparedDomain
    seeds: list[list[int]] = field(default_factory=list)  # of every run, by rank, after its end

    @staticmethod
    def build(folder: Path) -> "Scene":
        rows = [ragged_rows(seed, count=count) for seed, count in ((3, ROWS), (4, 5))]
        paths = [folder / f"{part}.arrow" for part in ("train", "validation")]
        for path, part in zip(paths, rows, strict=True):
            write_rows(path, domain="prose", rows=part)
        tokens = rows[0].num_loss_tokens
        domain = PreparedDomain("prose", *map(str, paths), ROWS, tokens, natural_weight=1.0)
        for tied in (False, True):
            tiny.save_pair(folder / f"tied-{tied}", tied=tied)
        return Scene(folder, *rows, domain)

    def plan(self, cell: Cell) -> RunPlan:
        pair = self.folder / f"tied-{cell.tied}"
        plan = plan_of(
            self.folder / cell.name,
            tiny.Pair(pair / "teacher", pair / "student"),
            (self.domain,),
            seed=7,
            steps=STEPS,
            log_every=1,
            student={
                "zero": cell.zero,
                "workers": cell.ranks,
                "train": LORA if cell.train == "lora" else {"kind": "full"},
            },
            batch={"rows_per_step": ROWS, "micro_batch": 2},
            losses=LOSSES[cell.losses],
            targets={"top_k": KEPT.get(cell.losses, tiny.VOCAB)},
            optimiser=OPTIMISER
            | {"schedule": cell.schedule}
            | ({} if cell.clips else {"clip_norm": None}),
            checkpoints={"every": STEPS},
        )
        return with_states(plan, self.folder / "cache") if cell.losses == "states" else plan

    def run(self, cells: Sequence[Cell]) -> None:
        for ranks in sorted({cell.ranks for cell in cells}):
            jobs = []
            for cell in cells:
                if cell.ranks == ranks:
                    plan = self.plan(cell)
                    mark_exported(plan)
                    jobs.append(as_job("train", plan))
            folder = self.folder / f"jobs-{ranks}" / cells[0].name
            for found in run_jobs(jobs, folder, ranks=ranks):
                assert found["error"] is None, found
                self.seeds.append(found["seeds"])

    @cache  # noqa: B019 a scene lives as long as its tests
    def expected(self, losses: str, schedule: str, train: str, clips: bool, tied: bool) -> Outcome:
        """What the plain loop does, for which ZeRO and ranks are nothing."""
        plan = self.plan(Cell(losses, schedule, 0, 1, train, clips, tied))
        return plain_loop(
            plan.config, train=self.train, validation=self.validation, kept=KEPT.get(losses)
        )

    def check(self, cell: Cell) -> None:
        """Every step's line, the weights and the evaluation after it, to 1e-6."""
        expected = self.expected(cell.losses, cell.schedule, cell.train, cell.clips, cell.tied)
        folder = self.folder / cell.name
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line.step for line in lines] == list(range(1, STEPS + 1))
        for line, step in zip(lines, expected.steps, strict=True):
            assert line.tokens == step["tokens"]
            assert line.lr == pytest.approx(step["lr"], rel=1e-9)
            assert line.loss == pytest.approx(step["loss"], rel=1e-6)
            assert line.grad_norm == pytest.approx(step["grad_norm"], rel=3e-6)
            assert list(line.terms.values()) == pytest.approx(step["terms"], rel=1e-6)
            if cell.losses != "text":
                assert line.domains["prose"].kl == pytest.approx(step["kl"], rel=1e-6)
            if cell.losses == "taid":
                assert line.teacher_share == pytest.approx(step["t"], abs=1e-6)
        after = json.loads((folder / "evaluations.json").read_text())["after"]["prose"]
        assert after["student_nll"] == pytest.approx(expected.nll, rel=1e-6)
        if cell.losses != "text":
            assert after["kl"] == pytest.approx(expected.kl, rel=1e-6)
        same_weights(weights_after(folder, STEPS), expected.weights)


def same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, and values within 1e-6; a saved adapter's weights do not name it."""
    expected = {name.replace(".default", ""): weight for name, weight in expected.items()}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name].double() - weight).abs().max() <= 1e-6, name


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene.build(tmp_path_factory.mktemp("plain"))
    scene.run(CELLS)
    return scene


def test_micro_batches_have_unequal_numbers_of_tokens(scene: Scene) -> None:
    counts = {int(mask.sum()) for mask in scene.train.loss_masks}
    assert len(counts) > ROWS // 2


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_steps_are_those_of_a_plain_loop(scene: Scene, cell: Cell) -> None:
    scene.check(cell)


def test_every_rank_has_random_numbers_of_its_own_that_repeat(scene: Scene) -> None:
    """So that no dropout is the same on two ranks; all runs end at one step with one seed."""
    assert {len(set(seeds)) for seeds in scene.seeds} == {2}
    assert len({tuple(seeds) for seeds in scene.seeds}) == 1


def test_clipping_changes_every_step_that_clips(scene: Scene) -> None:
    """Else the law would hold for a run that never clips."""
    for cell in CELLS:
        expected = scene.expected(cell.losses, cell.schedule, cell.train, cell.clips, cell.tied)
        assert min(step["grad_norm"] for step in expected.steps) > OPTIMISER["clip_norm"]


@pytest.mark.drill
def test_every_student_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    scene = Scene.build(tmp_path)
    for first in range(0, len(EVERY_CELL), 24):
        cells = EVERY_CELL[first : first + 24]
        scene.run(cells)
        for cell in cells:
            scene.check(cell)
