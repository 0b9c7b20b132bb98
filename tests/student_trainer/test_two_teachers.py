"""Two teachers, each best in its own domain: a student of both beats a student of either."""

import inspect
import json
import pydoc_data.topics
import textwrap
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cluster.planning.loading import load
from cluster.planning.preparation import prepare_run, run_plan
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.run.plan import RunPlan
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job, teacher
from tests.student_trainer.runs import mark_exported

pytestmark = pytest.mark.drill

CPU = torch.device("cpu")
DOMAINS = {"code": "coder", "prose": "writer"}  # domain -> its teacher
TEACHER_STEPS, STUDENT_STEPS, ROWS = 220, 120, 16


def texts() -> dict[str, list[str]]:
    """Source text of this Python's own library, and its topics of help."""
    modules: list[ModuleType] = [inspect, textwrap, json, yaml.emitter]
    code = "".join(map(inspect.getsource, modules))
    prose = "".join(pydoc_data.topics.topics.values())[: len(code)]
    return {name: textwrap.wrap(text, 400, replace_whitespace=False, drop_whitespace=False)
            for name, text in (("code", code), ("prose", prose))}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of both teachers, of different widths, untrained, and a smaller student."""
    folder = tmp_path_factory.mktemp("job")
    for name, documents in texts().items():
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines)
    for seed, (name, width) in enumerate({"coder": 64, "writer": 48, "student": 32}.items()):
        tiny.save_model(folder / name, width=width, layers=2, seed=20 + seed)
    config = {
        "name": "both",
        "steps": STUDENT_STEPS,
        "log_every": 40,
        "paths": {name: str(folder / name) for name in ("runs", "cache")} | {"root": str(folder)},
        "teachers": {name: {"model": name} for name in DOMAINS.values()},
        "student": {"model": "student", "zero": 0},
        "domains": {
            domain: {"train": f"{domain}.jsonl", "teacher": name}
            for domain, name in DOMAINS.items()
        },
        "data": {"context": 64, "validation_rows": 16},
        "batch": {"rows_per_step": ROWS, "micro_batch": ROWS},
        "optimiser": {"lr": 5e-3, "warmup_steps": 5},
        "mixture": {"policy": "fixed", "weights": dict.fromkeys(DOMAINS, 1.0)},
        "checkpoints": {"every": STUDENT_STEPS},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder / "job.yaml"


def train_teacher(folder: Path, rows: Rows) -> None:
    """Next tokens of a domain's rows, in place of the random weights in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    layouts, draw = Layouts(tuple(DOMAINS), True, CPU, CAUSAL_LM), np.random.default_rng(0)
    for _ in range(TEACHER_STEPS):
        chosen = np.zeros(len(rows), bool)
        chosen[draw.choice(len(rows), ROWS, replace=False)] = True
        batch = layouts.batch(rows.where(chosen.tolist()))
        logits = model(
            input_ids=batch["input_ids_BT"], position_ids=batch["position_ids_BT"]
        ).logits
        logits_NV = logits.flatten(0, 1)[batch["loss_index_N"]]
        torch.nn.functional.cross_entropy(logits_NV, batch["label_N"]).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)


def plan_with(job: Path, *overrides: str) -> RunPlan:
    """The plan of the job, its teachers in this process."""
    prepared = prepare_run(load(job, overrides))
    run_dir = Path(prepared.config.paths.runs) / prepared.config.name
    run_dir.mkdir(parents=True, exist_ok=True)
    parts = {
        name: run_plan(
            prepared.taught_by(name), run_dir=run_dir, teacher=teacher(asked.model).fingerprint
        )
        for name, asked in prepared.config.teachers.items()
    }
    return RunPlan.joined(prepared.config, prepared.domains, parts)


@pytest.fixture(scope="module")
def evaluations(job: Path) -> dict[str, dict[str, dict]]:
    """Of the student of both teachers and of each alone, on the same rows and steps, each compared
    with the teacher of each domain; the teachers are trained first."""
    untrained = prepare_run(load(job, []))
    for domain in untrained.domains:
        rows = RowStore.open(domain.train_path)
        train_teacher(job.parent / DOMAINS[domain.name], rows.take(range(len(rows))))
    both = plan_with(job)
    plans = {"both": both}
    for name in DOMAINS.values():
        domains = [f"domains.{domain}.teacher={name}" for domain in DOMAINS]
        described = untrained.config.teachers[name].model
        only = f"teachers={{{name}: {{model: {described}}}}}"
        plans[name] = plan_with(job, f"name={name}", only, *domains)
    for plan in plans.values():
        mark_exported(plan)
    compared = [replace(both, mode="evaluate", run_dir=plan.run_dir) for plan in plans.values()]
    jobs = [as_job("train", plan) for plan in (*plans.values(), *compared)]
    results = run_jobs(jobs, job.parent / "torchrun", ranks=1)
    assert [result["error"] for result in results] == [None] * len(jobs)
    return {
        name: json.loads((Path(plan.run_dir) / "evaluation.json").read_text())
        for name, plan in plans.items()
    }


def mean(evaluation: dict[str, dict], quantity: str) -> float:
    return float(np.mean([domain[quantity] for domain in evaluation.values()]))


def test_a_student_of_one_teacher_is_best_in_its_domain(evaluations) -> None:
    for domain, own in DOMAINS.items():
        (other,) = set(DOMAINS.values()) - {own}
        assert evaluations[own][domain]["student_nll"] < evaluations[other][domain]["student_nll"]


def test_a_student_of_both_is_better_in_the_mean_than_one_of_either(evaluations) -> None:
    for quantity in ("kl", "student_nll"):
        both = mean(evaluations["both"], quantity)
        for name in DOMAINS.values():
            assert both < mean(evaluations[name], quantity) - 0.1
