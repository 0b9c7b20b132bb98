"""Lines of a run: `metrics.jsonl` for programs, progress for people."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.config.models.student import QLoRATraining
from shared.config.run import Config
from shared.config.source import TokenSources
from shared.errors import not_kept
from shared.in_words import duration, shortened, thousands
from shared.mixture.weight_log import WeightEntry
from shared.run.metrics import (
    DomainMetrics,
    ExpertMetrics,
    ModulesMetrics,
    RolloutMetrics,
    StepMetrics,
    TeacherMetrics,
    TextMetrics,
    append_metrics,
)
from shared.run.run_dir import append_progress
from student_trainer.metrics.accumulator import COUNTERS, PARTS, MetricsAccumulator
from student_trainer.metrics.exported import export_line, seconds_left
from student_trainer.metrics.sums import EXPERT_TOKENS, POLICY, ROLLOUTS
from student_trainer.models.census import census
from student_trainer.run import Run
from student_trainer.sources.generated.rollouts import Rollouts
from student_trainer.sources.source import EFFORT
from student_trainer.weighing.llkd import BY_CLASS
from student_trainer.weighing.weightings import weighed_classes

log = logging.getLogger(__name__)


def write_line(run: Run, step: int, *, lr: float, grad_norm: float) -> None:
    """One line of metrics for programs and one for people; then begin the next."""
    machine = run.ranks.sum(run.metrics.machine)
    counters = machine[1 : -len(PARTS)]
    for seconds in (machine[:1], counters[::COUNTERS], machine[-len(PARTS) :]):
        seconds /= run.ranks.world_size  # these are means, the rest are sums
    line = metrics_line(
        run.metrics,
        run.config,
        step=step,
        lr=lr,
        grad_norm=grad_norm,
        entry=run.weight_log.ruling(step - 1),
        epochs=run.source.epochs(step),
        teacher_share=run.taid.teacher_share,
        machine=machine,
        written=None if run.config.source.is_dataset else run.rollouts.total(),
        workers=run.ranks.world_size,
        student_share=_student_share(run),
        modules=run.online and run.online.take_line(),
    )
    if run.balance is not None:
        line.balance, line.balancing_s = run.balance.line(), run.balance.take_seconds()
    error = None
    if run.ranks.leads:
        done = step - _line_before(step, run.config)
        export_line(line, run.config, steps_in_line=done)
        if run.trackers is not None:
            run.trackers.write(line, run.config, steps_in_line=done)
        try:
            append_metrics(run.files.metrics, line)
            say(run, progress_line(line, run.config, steps_in_line=done))
        except OSError as failure:
            error = not_kept(f"the line of step {step}", run.files.path, failure)
    run.ranks.agree(error)
    run.metrics.clear()
    run.rollouts.clear()


def say(run: Run, text: str) -> None:
    """A line for people, in the log and in the run's folder."""
    log.info(text)
    append_progress(run.files, text)


def introduce(run: Run) -> None:
    """Say what of the student trains, before it does."""
    if not run.ranks.leads:
        return
    quantises = isinstance(run.config.student.train, QLoRATraining)
    counted = census(run.student)
    say(run, counted.sentence(adapts=run.student.is_adapted, quantises=quantises))


def metrics_line(
    measured: MetricsAccumulator,
    config: Config,
    *,
    step: int,
    lr: float,
    grad_norm: float,
    entry: WeightEntry,
    epochs: tuple[float, ...],
    teacher_share: float,
    machine: np.ndarray,
    workers: int,
    written: Mapping[str, float] | None = None,
    student_share: float | None = None,
    modules: ModulesMetrics | None = None,
) -> StepMetrics:
    """The line of what was measured. `entry` was in force at its last step, `epochs` are as of
    then, and `machine` and `written` are already reduced over ranks."""
    tokens = int(measured.tokens_D.sum())
    layout, means = measured.layout, measured.sums / max(1, tokens)
    totals = layout.totals_in(means)
    domains = _by_domain(measured, config, entry, epochs)
    seconds, wait_s, units, wire_bytes, retried, hits = machine[: 1 + COUNTERS].tolist()
    compute_s, optimiser_s = machine[-len(PARTS) :].tolist()
    return StepMetrics(
        step=step,
        loss=totals["loss"],
        lr=lr,
        grad_norm=grad_norm,
        tokens=tokens,
        captured_mass=totals["captured_mass"] if config.needs_teacher else None,
        unseen_mass=totals["unseen_mass"] if config.needs_teacher else None,
        teacher_share=teacher_share if config.taid else None,
        student_share=student_share,
        terms=layout.losses_in(means),
        domains=domains,
        phase=entry.phase if config.progressive else None,
        modules=modules,
        experts=_experts(measured),
        selected_by_class=_selected_by_class(measured, config),
        **({} if written is None else _writing(measured, config.source, written)),
        seconds=seconds,
        teacher_wait_s=wait_s,
        compute_s=compute_s,
        optimiser_s=optimiser_s,
        units=round(units),
        wire_bytes=round(wire_bytes),
        retried_units=round(retried),
        cache_hits=round(hits),
        teachers=_by_teacher(config, domains, machine[1 : -len(PARTS)].reshape(-1, COUNTERS)),
        workers=workers,
    )


def _selected_by_class(measured: MetricsAccumulator, config: Config) -> dict[str, float] | None:
    """What a weighting learns of each class; None where it tells none apart."""
    classes = weighed_classes(config)
    if not classes:
        return None
    sums_4C = measured.sums[measured.layout.place(POLICY)].reshape(len(BY_CLASS), -1)
    rows_C, selected_C = (sums_4C[BY_CLASS.index(name)] for name in ("rows", "selected"))
    shares = zip(classes, selected_C.tolist(), rows_C.tolist(), strict=True)
    return {name: selected / rows for name, selected, rows in shares if rows}


def _experts(measured: MetricsAccumulator) -> ExpertMetrics | None:
    """How the experts of a mixture were used; None where no routers are balanced."""
    layout = measured.layout
    if not layout.routers[0]:
        return None
    tokens_LE = measured.sums[layout.place(EXPERT_TOKENS)].reshape(layout.routers)
    shares_LE = tokens_LE / np.maximum(1, tokens_LE.sum(1, keepdims=True))
    nats_LE = -shares_LE * np.log(np.where(shares_LE > 0, shares_LE, 1))
    num_experts = layout.routers[1]
    return ExpertMetrics(
        shares=shares_LE.round(4).tolist(),
        max_load=float(num_experts * shares_LE.max()),
        entropy=float(nats_LE.sum(1).mean() / np.log(num_experts)) if num_experts > 1 else 1.0,
    )


def _by_domain(
    measured: MetricsAccumulator, config: Config, entry: WeightEntry, epochs: tuple[float, ...]
) -> dict[str, DomainMetrics]:
    return {
        name: DomainMetrics(
            tokens=int(measured.tokens_D[d]),
            sequences=int(measured.rows_D[d]),
            weight=entry.weights[d],
            epochs=epochs[d],
            **_token_means(measured, config, d),
        )
        for d, name in enumerate(config.domains)
    }


def _student_share(run: Run) -> float | None:
    """What the student is to write of the steps to come, where that moves."""
    adaptive = run.source.adaptive if isinstance(run.source, Rollouts) else None
    return None if adaptive is None else adaptive.phi


def _writing(
    measured: MetricsAccumulator, source: TokenSources, written: Mapping[str, float]
) -> dict[str, Any]:
    """What models wrote, and what it took, by the names of `StepMetrics`."""
    return {
        "rollouts": _rollouts(measured, written) if source.writes else None,
        "texts": _texts(written) if source.teacher else None,
        **_effort(written),
    }


def _rollouts(measured: MetricsAccumulator, written: Mapping[str, float]) -> RolloutMetrics:
    """What the student wrote, from counts of all ranks."""
    tokens, ratio = (float(measured.sums[measured.layout.place(n)][0]) for n in ROLLOUTS)
    number = round(written["rollouts"])
    return RolloutMetrics(
        rollouts=number,
        tokens=round(tokens),
        ended=written["ended"] / number if number else None,
        lag=written["lag"] / number if number else None,
        importance_ratio=ratio / tokens if tokens else None,
        unanswered=round(written["unanswered"]),
        empty=round(written["empty"]),
    )


def _texts(written: Mapping[str, float]) -> TextMetrics:
    """What teachers wrote, from counts of all ranks."""
    number = round(written["texts"])
    return TextMetrics(
        texts=number,
        tokens=round(written["texts_tokens"]),
        ended=written["texts_ended"] / number if number else None,
        unanswered=round(written["texts_unanswered"]),
        empty=round(written["texts_empty"]),
    )


def _effort(written: Mapping[str, float]) -> dict[str, Any]:
    """What writing took, by the names of `StepMetrics`."""
    return {n: written[n] if n.endswith("_s") else round(written[n]) for n in EFFORT}


def _by_teacher(
    config: Config, domains: Mapping[str, DomainMetrics], counters: np.ndarray
) -> dict[str, TeacherMetrics]:
    """What is measured of each teacher; `counters` are those of all, then of each of several."""
    if not config.needs_teacher or len(counters) < len(config.teachers):
        return {}
    own = counters if len(config.teachers) == 1 else counters[1:]
    found = {}
    for name, (wait_s, units, wire_bytes, retried, hits) in zip(
        config.teachers, own.tolist(), strict=True
    ):
        taught = [d for domain, d in domains.items() if name in config.teachers_of(domain)]
        tokens = sum(domain.tokens for domain in taught)
        nats = sum(d.kl * d.tokens for d in taught if d.kl is not None)
        found[name] = TeacherMetrics(
            kl=nats / tokens if tokens else None,
            tokens=tokens,
            wait_s=wait_s,
            units=round(units),
            wire_bytes=round(wire_bytes),
            retried_units=round(retried),
            cache_hits=round(hits),
        )
    return found


def progress_line(line: StepMetrics, config: Config, *, steps_in_line: int) -> str:
    """One human line, readable in a job's log."""
    parts = [f"step {line.step}/{config.steps}", f"loss {line.loss:.3f}"]
    if config.progressive and line.phase is not None:
        parts.insert(1, f"phase {line.phase + 1}/{config.progressive.phases}")
    kls = [
        f"{shortened(name)} {_short(d.kl)}" for name, d in line.domains.items() if d.kl is not None
    ]
    if kls:
        parts.append("kl " + " ".join(kls))
    parts.append("mix " + " ".join(_short(d.weight) for d in line.domains.values()))
    unit = {"row": "rows", "word": "words"}.get(config.task.unit, "tok")
    parts.append(f"{thousands(line.tokens_per_s)} {unit}/s")
    if (selected := line.selected_share) is not None:
        parts.append(f"{selected:.0%} of tokens learnt")
    if (compared := line.compared_share) is not None:
        parts.append(f"{compared:.0%} of tokens compared")
    if line.rollouts is not None and line.rollouts.ended is not None:
        rate = thousands(line.tokens_written / max(line.writing_s, 1e-9))
        own = line.rollouts.tokens / max(1, line.tokens)
        parts.append(f"{own:.0%} own text, written at {rate} tok/s")
    if line.texts is not None:
        taught = line.texts.tokens / max(1, line.tokens)
        parts.append(f"{taught:.0%} the teacher's text")
    if line.experts is not None:
        parts.append(f"busiest expert {line.experts.max_load:.1f} x even")
    if line.balance is not None and line.balance.kappa is not None:
        parts.append(f"kappa {line.balance.kappa:.2g}")
    if line.modules is not None:
        parts.append(f"the teacher's modules nll {line.modules.nll:.3f}")
    if line.units or line.teacher_wait_s:
        parts.append(f"teacher wait {line.teacher_wait_s / max(line.seconds, 1e-9):.0%}")
    if len(config.teachers) > 1:
        parts += [_teacher(name, of, line.seconds) for name, of in line.teachers.items()]
    parts.append(f"eta {duration(seconds_left(line, config, steps_in_line))}")
    return " | ".join(parts)


def _teacher(name: str, measured: TeacherMetrics, seconds: float) -> str:
    """One of several teachers: KL, share of the time that waited, bytes per loss token."""
    kl = "" if measured.kl is None else f" kl {_short(measured.kl)}"
    wait = measured.wait_s / max(seconds, 1e-9)
    return f"{name}{kl} wait {wait:.0%} {measured.wire_bytes / max(1, measured.tokens):.0f} B/tok"


def _token_means(measured: MetricsAccumulator, config: Config, d: int) -> dict[str, float | None]:
    """What `DomainMetrics` has per loss token of domain `d`; None where it was not measured."""
    count = measured.tokens_D[d]

    def mean(quantity: str, applies: bool) -> float | None:
        return float(measured.by_domain(quantity)[d] / count) if applies and count else None

    reports = {name: mean(name, True) for name in measured.layout.reports}
    return {"kl": mean("kl", config.needs_teacher), **reports}


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _line_before(step: int, config: Config) -> int:
    """Step of the metrics line before the one at `step`."""
    return (step - 1) // config.log_every * config.log_every
