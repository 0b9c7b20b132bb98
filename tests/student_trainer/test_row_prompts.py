"""Context distillation by row: a student learns to answer without what its teacher is shown."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.config.source import TokenSources
from shared.data.rollouts import prompts_of
from shared.data.row_store import RowStore
from shared.errors import CheckpointError
from shared.prompts.prefix import Opening
from shared.prompts.row_prompts import (
    RowOpenings,
    RowPrompt,
    key_of,
    read_row_prompts,
    write_row_prompts,
)
from shared.run.metrics import StepMetrics, read_metrics
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import DOMAINS, mark_exported, prepared_domains
from tests.student_trainer.sources.generated.test_rollouts import written_plan

STEPS = 12
OWN_TEXT = TokenSources(max_new_tokens=10, prompt_tokens=6)  # as `written_plan` has it
RUNS = {
    "rows": {"source": {"student": 0.0, "dataset": 1.0}},
    "own-text": {"source": {"student": 0.5, "dataset": 0.5, "teacher_mix": 0.2, "lag": 1}},
    "blind": {"source": {"student": 0.0, "dataset": 1.0}},
}


def hints(path: Path, domains, *, salt: int = 0) -> None:
    """Something of its own before each document of the rows of both splits."""
    found: dict[bytes, RowPrompt] = {}
    for prepared in domains:
        for file in (prepared.train_path, prepared.validation_path):
            rows = next(RowStore.open(file).units(10_000))
            documents = rows.documents()
            parts = zip(documents.column("input_ids"), documents.column("loss_mask"), strict=True)
            written = prompts_of(rows, OWN_TEXT, context=64)
            begun = ((one.input_ids, np.zeros(len(one.input_ids))) for one in written)
            for ids, mask in (*parts, *begun):
                key = key_of(ids, mask)
                seed = int.from_bytes(key[:4], "little")
                draw = np.random.default_rng(seed + salt)
                shown = draw.integers(3, tiny.VOCAB, 6).astype(np.int32)
                opening = Opening(np.zeros(0, np.int32), shown)
                prompt = ids[: int(np.argmax(mask)) + 1] if mask.any() else ids
                found[key] = RowPrompt("a:1", opening, prompt, len(ids))
    write_row_prompts(path, found.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("row-prompts")
    pair, domains = tiny.save_pair(folder / "pair"), prepared_domains(folder)
    hints(folder / "hints.arrow", domains)
    hints(folder / "others.arrow", domains, salt=1)
    shown, others = (read_row_prompts(folder / f"{name}.arrow") for name in ("hints", "others"))
    itself = replace(pair, student=pair.teacher)

    def job(name: str, openings: RowOpenings | None, steps: int = STEPS) -> dict:
        plan = written_plan(
            folder / "runs" / name,
            itself,
            domains,
            steps=steps,
            checkpoints={"every": 100},
            losses=[{"kind": "forward_kl"}],
            student={"workers": 1},
            **RUNS[name],
        )
        mark_exported(plan, step=STEPS)
        if openings is not None:
            plan = replace(plan, openings=dict.fromkeys(DOMAINS, openings))
        return as_job("train", plan)

    jobs = [job(name, None if name == "blind" else shown) for name in RUNS]
    run_jobs(jobs, folder / "jobs", ranks=1)
    run_jobs([job("rows", others, STEPS + 1)], folder / "jobs-other", ranks=1)
    return folder / "runs"


def test_a_run_does_not_go_on_with_a_teacher_that_is_shown_something_else(runs: Path):
    (result,) = json.loads((runs.parent / "jobs-other" / "results.json").read_text())
    assert result["error"] == CheckpointError.__name__
    assert "was written with what the teacher is shown with each row" in result["message"]


def lines(run: Path) -> list[StepMetrics]:
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.parametrize(("name", "left"), [("rows", 0.8), ("own-text", 0.95)])
def test_a_student_learns_what_its_teacher_says_with_what_it_is_shown(
    runs: Path, name: str, left: float
):
    """The student is the teacher itself: without anything shown there is nothing to learn. Text of
    its own is new at every step, and less of it is learnt."""
    found = lines(runs / name)
    assert lines(runs / "blind")[0].loss < 1e-5 < 0.01 < found[0].loss
    first, last = (np.mean([line.loss for line in part]) for part in (found[:3], found[-3:]))
    assert last < left * first
