"""Run directories made up for tests: the right files and plausible shapes, no training behind."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import yaml

from shared.config.mixture import Mixture
from shared.config.run import Config
from shared.mixture.weight_log import WeightEntry, write_entry
from shared.run.metrics import (
    DomainEvaluation,
    DomainMetrics,
    StepMetrics,
    TeacherMetrics,
    append_metrics,
)

TOKENS = 2_000  # loss tokens of a step
LOG_EVERY = 10


def write_run(
    directory: Path,
    *,
    domains: tuple[str, ...] = ("code", "reference", "legal", "mathematics"),
    steps: int = 300,
    teacher: bool = True,
    finished: bool = True,
    baseline: bool = False,
    losses: tuple[str, ...] = ("forward_kl",),
    teachers: tuple[str, ...] = ("main",),
) -> Config:
    """Made-up files of a run as the trainer would have written them; returns its config. Teachers
    take turns among the domains."""
    directory.mkdir(parents=True)
    losses = losses if teacher else ("cross_entropy",)
    config = Config.model_validate(
        {
            "name": "made-up",
            "steps": 300,
            "log_every": LOG_EVERY,
            "teachers": {name: {"model": f"models/{name}"} for name in teachers},
            "student": {"model": "models/student"},
            "domains": {
                name: {"train": f"data/{name}.jsonl", "teacher": teachers[i % len(teachers)]}
                for i, name in enumerate(domains)
            },
            "losses": [{"kind": kind} for kind in losses],
            "mixture": {"policy": "ddk", "interval": 50},
            "baseline": baseline,
        }
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    (directory / "environment.json").write_text(json.dumps({"python": "3.11", "torch": "2.13"}))
    log = _write_weights(directory / "weight_log.jsonl", domains, steps=steps)
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        line = _line(step, domains, log, teacher=teacher, losses=losses)
        line.teachers = _by_teacher(line, config) if teacher else {}
        append_metrics(directory / "metrics.jsonl", line)
    _write_evaluations(directory, domains, teacher=teacher, finished=finished)
    if baseline:
        write_run(directory / "baseline", domains=domains, steps=steps, losses=("cross_entropy",))
    return config


def controlled(
    mixture: Mixture, *, domains: tuple[str, ...], steps: int = 1000, **parts: object
) -> Config:
    """A config of which a controller reads the domains and what it decides."""
    return Config.model_validate(
        {
            "name": "controlled",
            "steps": steps,
            "teachers": {"main": {"model": "models/teacher"}},
            "student": {"model": "models/student"},
            "domains": {name: {"train": f"data/{name}.jsonl"} for name in domains},
            "mixture": mixture.model_dump(),
            **parts,
        }
    )


def level(index: int) -> float:
    """How far a domain's student starts from its teacher, nats."""
    return 2.2 + 0.6 * math.sin(1.7 * index)


def _write_weights(path: Path, domains: tuple[str, ...], *, steps: int) -> list[WeightEntry]:
    entries = []
    for index, at in enumerate(range(0, max(1, steps), 50)):
        raw = [1 + 0.5 * math.sin(i + 0.4 * index) for i in range(len(domains))]
        shares = tuple(value / sum(raw) for value in raw)
        entries.append(WeightEntry(index, at, at + 2 if at else 0, shares))
        write_entry(path, domains, entries[-1])
    return entries


def _line(
    step: int,
    domains: tuple[str, ...],
    log: list[WeightEntry],
    *,
    teacher: bool,
    losses: tuple[str, ...],
) -> StepMetrics:
    rng = random.Random(step)
    weights = next(e for e in reversed(log) if e.effective_from < step).weights
    fall = 0.3 + 0.7 * math.exp(-step / 90)
    kls = [level(i) * fall * rng.uniform(0.97, 1.03) for i in range(len(domains))]
    parts = {
        name: DomainMetrics(
            kl=kls[i] if teacher else None,
            tokens=round(TOKENS * LOG_EVERY * weights[i] * rng.uniform(0.99, 1.01)),
            sequences=round(80 * weights[i]),
            weight=weights[i],
            **(_adaptive(rng) if "atkd" in losses else {}),
        )
        for i, name in enumerate(domains)
    }
    seconds = rng.uniform(2.0, 2.4)
    return StepMetrics(
        step=step,
        loss=sum(kls) / len(kls),
        lr=1e-3,
        grad_norm=0.4 + fall * rng.uniform(0.9, 1.2),
        tokens=sum(part.tokens for part in parts.values()),
        captured_mass=0.97 + 0.01 * rng.random() if teacher else None,
        terms={kind: sum(kls) / len(kls) * (1 + 0.4 * i) for i, kind in enumerate(losses)},
        domains=parts,
        seconds=seconds,
        teacher_wait_s=seconds * rng.uniform(0.01, 0.06) if teacher else 0.0,
        compute_s=seconds * 0.75,
        optimiser_s=seconds * 0.125,
        units=20 if teacher else 0,
        wire_bytes=400 * TOKENS * LOG_EVERY if teacher else 0,
        retried_units=1 if step == 120 else 0,
    )


def _by_teacher(line: StepMetrics, config: Config) -> dict[str, TeacherMetrics]:
    """Wait and bytes in equal parts, and units of 10."""
    found = {}
    for name in config.teachers:
        taught = [d for n, d in line.domains.items() if config.teacher_of(n) == name]
        tokens = sum(domain.tokens for domain in taught)
        nats = sum((domain.kl or 0.0) * domain.tokens for domain in taught)
        share = 1 / len(config.teachers)
        found[name] = TeacherMetrics(
            kl=nats / tokens,
            tokens=tokens,
            wait_s=share * line.teacher_wait_s,
            units=10,
            wire_bytes=round(share * line.wire_bytes),
        )
    return found


def _adaptive(rng: random.Random) -> dict[str, float]:
    shares = {"hard_share": rng.uniform(0.3, 0.7), "uncertainty": rng.uniform(0.4, 0.6)}
    return shares | {"tkd": rng.uniform(0.1, 0.2), "dkd": rng.uniform(1, 2)}


def _write_evaluations(
    directory: Path, domains: tuple[str, ...], *, teacher: bool, finished: bool
) -> None:
    hard = directory.name == "baseline"
    evaluations = {}
    for when, share in (("before", 1.0), ("after", 0.45 if hard else 0.3)):
        evaluations[when] = {
            name: asdict(
                DomainEvaluation(
                    student_nll=2.4 + 0.2 * i % 1 + level(i) * share,
                    teacher_nll=2.4 + 0.2 * i % 1 if teacher else None,
                    kl=level(i) * share if teacher else None,
                    kl_kind="full" if teacher else "none",
                    tokens=4_000,
                )
            )
            for i, name in enumerate(domains)
        }
    if not finished:
        del evaluations["after"]
    (directory / "evaluations.json").write_text(json.dumps(evaluations))
