"""The matrix of students: {full, LoRA, QLoRA} x ZeRO {0,1,2,3}, tied and untied, ragged shards.

`make test` runs cells that differ in as much as they can; the others, which have what one of them
has in another way, are drills.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.planning.bases import student_upcycled
from shared.run.metrics import read_metrics
from tests import tiny
from tests.student_trainer.comparing import comparable_lines, final_weights, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import (
    mark_exported,
    plan_of,
    prepared_domains,
    with_states,
)
from tests.telling import asked

LORA = {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
KINDS: dict[str, dict] = {"full": {"kind": "full"}, "lora": LORA, "qlora": LORA | {"kind": "qlora"}}
KL, CE = {"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.05}
# Steps of t far above its line, so that a resume that forgets the state shows.
TAID = {"kind": "taid", "t_start": 0.2, "alpha": 0.9, "beta": 0.5}
REVERSE = {"kind": "reverse_kl"}
SELF = {"kind": "self_features", "weight": 0.1, "layers": {1: 2}}
BALANCE = {"kind": "router_balance", "weight": 0.01}
HIDDEN = {"kind": "hidden_states", "weight": 0.1, "layers": {1: 1, 3: 2}}


@dataclass(frozen=True)
class Cell:
    """One student; every second one has a tied head."""

    kind: str
    zero: int
    tied: bool
    dtype: str = "float32"
    checkpointing: bool = False
    hidden: bool = False
    taid: bool = False
    states: bool = False
    drawn: bool = False
    naming: bool = False
    weighing: str = ""  # a policy
    experts: str = ""  # which of an upcycled student's weights train

    @property
    def upcycle(self) -> dict | None:
        """Into a mixture whose experts adapters reach, where there are any."""
        every = 2 if self.kind == "full" else 1
        return {"train": self.experts, "every": every} if self.experts else None

    @property
    def train(self) -> dict:
        """Without dropout where adapters are on experts, for which peft has none."""
        asked = KINDS[self.kind]
        return asked | {"dropout": 0.0} if self.experts and "dropout" in asked else asked

    @property
    def trains_part(self) -> bool:
        return self.kind != "full" or self.experts == "experts"

    @property
    def name(self) -> str:
        extras = [self.dtype] * (self.dtype != "float32") + ["checkpointing"] * self.checkpointing
        parts = [self.kind, f"zero{self.zero}", "tied" if self.tied else "untied", *extras]
        for extra in ("hidden", "taid", "states", "drawn", "naming"):
            parts += [extra] * getattr(self, extra)
        named = (self.weighing, self.experts and f"upcycled_{self.experts}")
        return "-".join([*parts, *filter(None, named)])


CELLS = [
    *(
        Cell(kind, zero, tied=(zero + n) % 2 == 0)
        for n, kind in enumerate(KINDS)
        for zero in range(4)
    ),
    Cell("full", 0, tied=False, dtype="bfloat16"),
    Cell("full", 3, tied=True, dtype="bfloat16"),
    Cell("qlora", 3, tied=True, dtype="bfloat16"),
    Cell("full", 3, tied=True, checkpointing=True),
    Cell("lora", 3, tied=True, hidden=True),
    Cell("full", 2, tied=False, hidden=True, dtype="bfloat16"),
    Cell("full", 2, tied=True, taid=True),
    Cell("full", 3, tied=True, dtype="bfloat16", states=True),
    Cell("full", 2, tied=False, drawn=True),
    Cell("full", 3, tied=False, naming=True),
    Cell("lora", 0, tied=True, naming=True),
    Cell("qlora", 2, tied=False, dtype="bfloat16", naming=True),
    Cell("full", 0, tied=True, weighing="llkd"),
    Cell("lora", 1, tied=False, dtype="bfloat16", weighing="instance_weights"),
    Cell("qlora", 2, tied=True, drawn=True, weighing="llkd"),
    Cell("full", 3, tied=False, hidden=True, weighing="instance_weights"),
    Cell("full", 3, tied=True, dtype="bfloat16", states=True, weighing="llkd"),
    *(Cell("full", zero, tied=zero == 2, experts="experts") for zero in range(4)),
    Cell("full", 1, tied=True, dtype="bfloat16", experts="all"),
    Cell("full", 3, tied=True, checkpointing=True, experts="all"),
    Cell("lora", 2, tied=False, experts="experts"),
    Cell("qlora", 3, tied=True, dtype="bfloat16", experts="experts"),
]
EXPORTED = (
    *("full-zero3-untied-naming", "lora-zero3-tied-hidden", "qlora-zero2-tied"),
    *("full-zero3-tied-bfloat16-states", "full-zero3-untied-upcycled_experts"),
)
TELLING = (*("lora-zero1-tied", "full-zero2-tied-taid", "full-zero2-untied-drawn", *EXPORTED),)
every_cell = pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=[pytest.mark.drill] * (cell.name not in TELLING))
        for cell in CELLS
    ],
)


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> list[Cell]:
    """Those that are asked for, and those that tests name."""
    chosen = {*EXPORTED, "full-zero2-tied-taid", *(cell.name for cell in asked(request, "cell"))}
    return [cell for cell in CELLS if cell.name in chosen]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, cells: list[Cell]) -> Path:
    """A folder with a run of every cell, and each run again, resumed at its middle."""
    folder = tmp_path_factory.mktemp("matrix")
    domains, jobs = prepared_domains(folder), []
    pairs = {tied: tiny.save_pair(folder / f"tied-{tied}", tied=tied) for tied in (True, False)}
    for cell in cells:
        plan = plan_of(
            folder / cell.name,
            pairs[cell.tied],
            domains,
            student={
                "train": cell.train,
                "zero": cell.zero,
                "dtype": cell.dtype,
                "activation_checkpointing": cell.checkpointing,
                "upcycle": cell.upcycle,
            },
            losses=[TAID if cell.taid else REVERSE if cell.naming else KL, CE]
            + [HIDDEN, SELF] * cell.hidden
            + [BALANCE] * bool(cell.experts),
            targets={
                "selector": "threshold" if cell.drawn else "top_k",
                "student_ids": 8 * cell.naming,
            },
            weighting={"policy": cell.weighing or "uniform"},
            optimiser={"lr": 5e-2 if cell.trains_part else 1e-2},
            paths={"cache": str(folder / "cache")},
        )
        plan = replace(plan, config=student_upcycled(plan.config))
        if cell.states:
            plan = with_states(plan, folder / "cache")
        if cell.name not in EXPORTED:
            mark_exported(plan)
        jobs.append(as_job("resumed", plan, at=2))
    run_jobs(jobs, folder / "jobs")
    return folder


@every_cell
def test_a_cell_trains_and_resumes_bit_for_bit(matrix: Path, cell: Cell) -> None:
    straight, resumed = matrix / cell.name, matrix / f"{cell.name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)
    assert [line.step for line in read_metrics(straight / "metrics.jsonl")] == [3, 4]


def test_taids_target_moves_and_its_state_is_the_same_after_a_resume(matrix: Path) -> None:
    states, shares = [], []
    for run in ("full-zero2-tied-taid", "full-zero2-tied-taid-resumed"):
        path = matrix / run / "checkpoints" / "step-000004" / "state.json"
        states.append(json.loads(path.read_text())["interpolation"])
        shares.append([line.teacher_share for line in read_metrics(matrix / run / "metrics.jsonl")])
    assert states[0] == states[1]
    assert shares[0] == shares[1]
    first, last = shares[0]
    assert first is not None
    assert last is not None
    line = 0.2 + 0.8 * 2 / 4  # of the last step that the first of the two lines covers
    assert line + 0.1 < first < last == states[0]["teacher_share"] < 1
    assert states[0]["momentum"] != 0


@every_cell
def test_a_cell_learns(matrix: Path, cell: Cell) -> None:
    found = json.loads((matrix / cell.name / "evaluations.json").read_text())
    for domain in found["before"]:
        assert found["after"][domain]["kl"] < found["before"][domain]["kl"]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_plain_and_says_what_it_is(matrix: Path, name: str) -> None:
    export = matrix / name / "export"
    base = {"config.json"} if name.startswith("full") else {"adapter_config.json"}
    files = {path.name for path in export.iterdir()}
    assert base | {"tokenizer.json", "generation_config.json", "README.md"} <= files
    assert ("upcycled_from.json" in files) == ("upcycled" in name)
    card = (export / "README.md").read_text()
    assert "| code |" in card
    assert "Licence" in card
    found = json.loads((matrix / name / "evaluations.json").read_text())
    assert f"{found['after']['prose']['kl']:.3f}" in card
    assert ("of the base frozen (digest" in card) == (not name.startswith("full"))


@pytest.mark.parametrize("name", EXPORTED[:1])
def test_an_exported_model_generates_with_its_cache(matrix: Path, name: str) -> None:
    config = json.loads((matrix / name / "export" / "config.json").read_text())
    assert config.get("use_cache", True)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_checkpoint_holds_no_base_weight(
    matrix: Path, cells: list[Cell], kind: str
) -> None:
    for cell in (cell for cell in cells if cell.kind == kind):
        names = final_weights(matrix / cell.name)
        assert names
        assert all("lora_" in name for name in names)
