"""The model card of an export: the facts of the run that made it."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shared.config.base import Section
from shared.config.losses import Loss
from shared.config.models.student import LoRATraining, QLoRATraining, Student, Upcycle
from shared.config.run import Config
from shared.config.weighting import Weighting
from shared.loading import called, is_bag, merged_of, stored_as, upcycled_of
from shared.mixture.weight_log import read_log
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir, read_written
from student_trainer.state.usage import Usage

TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = ("tutelage", "torch", "transformers", "peft", "deepspeed")


def model_card(
    config: Config,
    *,
    run_dir: RunDir,
    step: int,
    frozen: Mapping | None,
    usage: Usage,
    merged: bool = False,
) -> str:
    """README.md of the export of a checkpoint after `step` updates; `frozen` are the facts of
    `student_trainer.models.frozen` where the student has adapters, which `merged` says lie in the
    base's weights."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False
    )
    return environment.get_template("model_card.md").render(
        _facts(config, merged=merged)
        | _measured(config, run_dir=run_dir, step=step)
        | {"frozen": frozen, "usage": usage}
    )


def _facts(config: Config, *, merged: bool) -> dict:
    student, optimiser = config.student, config.optimiser
    adapted = isinstance(student.train, LoRATraining)
    return {
        "name": config.name,
        "unit": config.task.unit,
        "is_bag": is_bag(student.model),
        "library": "peft" if adapted and not merged else "transformers",
        "merged": merged,
        "quantised": isinstance(student.train, QLoRATraining),
        **_student(student.model),
        "trusted": ", trust_remote_code=True" if student.trust_remote_code else "",
        "teacher": _teachers(config) if config.needs_teacher else "its text alone",
        "rows_per_step": config.batch.rows_per_step,
        "context": config.data.context,
        "kind": _trained(student),
        "dtype": student.dtype,
        "zero": student.zero,
        "seed": config.seed,
        "losses": ", ".join(_loss(loss) for loss in config.losses),
        "weighting": _weighting(config.weighting) if config.weighting.weighs else "",
        "lr": optimiser.lr,
        "schedule": optimiser.schedule,
        "warmup": optimiser.warmup_steps,
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES),
    }


def _measured(config: Config, *, run_dir: RunDir, step: int) -> dict:
    evaluations = read_written(run_dir.path / "evaluations.json")
    before, after = evaluations.get("before", {}), evaluations.get("after", {})
    entries = read_log(run_dir.weight_log, config.domains).entries
    lines = [line for line in read_metrics(run_dir.metrics) if line.step <= step]
    return {
        "steps": step,
        "tokens": f"{sum(line.tokens for line in lines):,}",
        "kl_kind": next((v["kl_kind"] for v in before.values()), "none"),
        "table": [_row(n, before.get(n, {}), after.get(n, {})) for n in config.domains],
        "weights": [
            {"name": name, "first": f"{first:.3f}", "last": f"{last:.3f}"}
            for name, first, last in zip(
                config.domains, entries[0].weights, entries[-1].weights, strict=True
            )
        ]
        if entries
        else [],
    }


def _row(name: str, before: dict, after: dict) -> dict[str, str]:
    return {
        "name": name,
        "teacher": _number(before.get("teacher_nll")),
        "before": _number(before.get("student_nll")),
        "after": _number(after.get("student_nll")),
        "kl_before": _number(before.get("kl")),
        "kl_after": _number(after.get("kl")),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _loss(loss: Loss) -> str:
    return f"{loss.kind} ({_settings(loss, 'kind')})"


def _weighting(weighting: Weighting) -> str:
    return f"{weighting.policy} ({_settings(weighting, 'policy')})"


def _settings(section: Section, but: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in section.model_dump(exclude={but}).items())


def _trained(student: Student) -> str:
    """The way to train, and which weights of an upcycled student learn whole."""
    kind = student.train.kind
    alone = kind == "full" and student.upcycle and student.upcycle.train == "experts"
    return f"{kind}, experts and routers alone" if alone else kind


def _teachers(config: Config) -> str:
    """The teacher, or each of several with its domains."""
    said = []
    for name, teacher in config.teachers.items():
        named = called(teacher.model)
        if (stored := _stored(teacher.model)) is not None:
            named += f" (stored {stored})"
        if teacher.adapter:
            named += f" (adapter {called(teacher.adapter)})"
        if (followed := teacher.follow_student) is not None:
            named += f", the student itself at least {followed.lag} steps before"
        taught = [domain for domain in config.domains if name in config.teachers_of(domain)]
        said.append(named if len(config.teachers) == 1 else f"{named} in {', '.join(taught)}")
    return " and by ".join(said)


def _stored(model: str) -> str | None:
    """How a teacher's weights lie in its folder, where that is few bits."""
    path = Path(model) / "config.json"
    return stored_as(SimpleNamespace(**json.loads(path.read_text()))) if path.exists() else None


def _student(model: str) -> dict[str, str]:
    """The student as the card calls it, and the model that a hub is to link it with: of merged
    weights those that were merged, and of a mixture the dense model, not the folder that keeps
    them."""
    upcycled = upcycled_of(Path(model))
    if upcycled is not None:
        dense = _student(upcycled["model"])
        words = Upcycle(**upcycled["asked"]).in_words()
        return dense | {"student": f"{dense['student']}, upcycled to {words},"}
    merged = merged_of(Path(model))
    if merged is None:
        return {"student": called(model), "base_model": called(model)}
    adapter, base = map(called, merged)
    return {"student": f"{adapter} merged into {base}", "base_model": base}
