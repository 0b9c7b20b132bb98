"""The numbers of a run, as `summary.json` and `baseline.json` name them.

NLL and KL are nats per loss token of validation text; times are seconds, sizes bytes.
"""

from pathlib import Path
from typing import NotRequired, TypedDict, cast

from cluster.report.classes import ClassSummary, class_summary
from cluster.report.record import Evaluations, RunRecord, finite
from cluster.report.text import TextSummary
from shared.run.metrics import DomainEvaluation, StepMetrics
from shared.run.run_dir import RunDir, damaged, read_written


class Failures(TypedDict):
    """What went wrong and was repaired."""

    teacher_restarts: int
    student_restarts: int
    retried_units: int
    rollout_restarts: NotRequired[int]  # of the student's copies that write, where there are any


class DomainSummary(TypedDict):
    """One domain; None where a run had no teacher or has not got that far."""

    teacher_nll: float | None
    student_nll_before: float | None
    student_nll_after: float | None
    kl_kind: str  # "full", "bucketed-K", "aligned", "grouped" or "none"
    kl_before: float | None  # KL(teacher || student)
    kl_after: float | None
    weight_first: float | None  # share of loss tokens at the first step
    weight_last: float | None  # at the last step done
    sequences: int  # rows trained on
    epochs: float | None  # rows trained on over the domain's rows
    text: TextSummary | None  # what became of its text
    # Accuracy, macro F1 and calibration error on validation rows, where these have classes.
    classes: NotRequired[dict[str, ClassSummary]]


class TeacherSummary(TypedDict):
    """One teacher, over its domains; None where a run has not got that far."""

    model: str
    domains: list[str]
    tokens: int  # loss tokens of its domains that training asked about
    wait_fraction: float  # of training wall time, mean over ranks
    wire_bytes_per_token: float
    cache_hit_rate: float
    retried_units: int
    kl_before: float | None  # KL(teacher || student), mean over validation loss tokens
    kl_after: float | None


class Summary(TypedDict):
    """summary.json."""

    status: str
    steps: int
    tokens: int  # loss tokens trained on
    tokens_per_s: float  # over training wall time without start-up, evaluation and checkpoints
    teacher_wait_fraction: float  # of the same time, mean over ranks
    wire_bytes_per_token: float  # serialised Table bytes per loss token
    cache_hit_rate: float  # scoring units read from disk
    captured_mass: float | None  # teacher probability on the kept ids, mean per loss token
    phases: list[int] | None  # first step of each phase that began; None without phases
    domains: dict[str, DomainSummary]
    teachers: dict[str, TeacherSummary]
    failures: Failures
    start: dict[str, float]  # seconds by stage, see `shared.run.start`; empty before a first step


class Comparison(TypedDict):
    """Both students after training on the same rows, one domain."""

    distilled_nll: float | None
    hard_labels_nll: float | None
    distilled_kl: float | None
    hard_labels_kl: float | None


class BaselineSummary(Summary):
    """baseline.json: the summary of the hard-labels run, and both students side by side."""

    students: dict[str, Comparison]


def measure(record: RunRecord, *, status: str, failures: Failures) -> Summary:
    """The summary of a run as far as it has come."""
    lines = record.lines
    tokens, seconds = sum(m.tokens for m in lines), sum(m.seconds for m in lines)
    return Summary(
        status=status,
        steps=record.steps,
        tokens=tokens,
        tokens_per_s=_ratio(tokens, seconds),
        teacher_wait_fraction=_ratio(sum(m.teacher_wait_s for m in lines), seconds),
        wire_bytes_per_token=_ratio(sum(m.wire_bytes for m in lines), tokens),
        cache_hit_rate=_ratio(sum(m.cache_hits for m in lines), sum(m.units for m in lines)),
        captured_mass=_captured_mass(lines),
        phases=_phases(record),
        domains={name: domain_summary(record, name) for name in record.domains},
        teachers={name: teacher_summary(record, name) for name in record.config.teachers},
        failures=failures,
        start=read_written(RunDir(record.directory).start),
    )


def measure_baseline(record: RunRecord, baseline: RunRecord) -> BaselineSummary:
    """The hard-labels run beside the distilled one."""
    path = baseline.directory / "summary.json"
    told = read_written(path)
    none = Failures(teacher_restarts=0, student_restarts=0, retried_units=0)
    summary = measure(
        baseline,
        status=told.get("status", "finished" if baseline.after else "unfinished"),
        failures=failures_in(path, told, none),
    )
    students = {name: _compare(record, baseline, name) for name in record.domains}
    return BaselineSummary(**summary, students=students)


def failures_in(path: Path, told: dict, otherwise: Failures) -> Failures:
    """The failures that a summary read from `path` counts; `otherwise` where it counts none.
    Raises DamagedError."""
    found = told.get("failures", otherwise)
    wanted = Failures.__required_keys__
    if isinstance(found, dict) and all(type(found.get(name)) is int for name in wanted):
        return cast(Failures, found)
    raise damaged(path, "its failures are no counts")


def domain_summary(record: RunRecord, name: str) -> DomainSummary:
    """One domain of `summary.json`."""
    before, after = record.before.get(name), record.after.get(name)
    known = after or before
    found = DomainSummary(
        teacher_nll=finite(known.teacher_nll) if known else None,
        student_nll_before=nll(before),
        student_nll_after=nll(after),
        kl_kind=known.kl_kind if known else "none",
        kl_before=kl(before),
        kl_after=kl(after),
        weight_first=record.weights(0).get(name),
        weight_last=record.weights(max(0, record.steps - 1)).get(name),
        sequences=sum(m.domains[name].sequences for m in record.lines if name in m.domains),
        epochs=record.lines[-1].domains[name].epochs if record.lines else None,
        text=record.text.get(name),
    )
    if (classes := class_summary(record, name)) is not None:
        found["classes"] = classes
    return found


def teacher_summary(record: RunRecord, name: str) -> TeacherSummary:
    """One teacher of `summary.json`."""
    config = record.config
    asked = [line.teachers[name] for line in record.lines if name in line.teachers]
    tokens, seconds = sum(m.tokens for m in asked), sum(line.seconds for line in record.lines)
    domains = [domain for domain in record.domains if name in config.teachers_of(domain)]
    return TeacherSummary(
        model=config.teachers[name].model,
        domains=domains,
        tokens=tokens,
        wait_fraction=_ratio(sum(m.wait_s for m in asked), seconds),
        wire_bytes_per_token=_ratio(sum(m.wire_bytes for m in asked), tokens),
        cache_hit_rate=_ratio(sum(m.cache_hits for m in asked), sum(m.units for m in asked)),
        retried_units=sum(m.retried_units for m in asked),
        kl_before=_mean_kl(record.before, domains),
        kl_after=_mean_kl(record.after, domains),
    )


def _mean_kl(evaluations: Evaluations, domains: list[str]) -> float | None:
    """Mean over the validation tokens of some domains, None unless all were compared."""
    known = [(kl(evaluations.get(name)), evaluations.get(name)) for name in domains]
    sums = [
        (value * e.tokens, e.tokens) for value, e in known if e is not None and value is not None
    ]
    tokens = sum(count for _, count in sums)
    return sum(nats for nats, _ in sums) / tokens if tokens and len(sums) == len(domains) else None


def _phases(record: RunRecord) -> list[int] | None:
    if record.config.progressive is None:
        return None
    begun = [entry for entry in record.log.entries if entry.effective_from < max(1, record.steps)]
    phases = [entry.phase for entry in begun]
    return [begun[phases.index(phase)].effective_from for phase in sorted(set(phases))]


def _compare(record: RunRecord, baseline: RunRecord, name: str) -> Comparison:
    distilled, hard = record.after.get(name), baseline.after.get(name)
    return Comparison(
        distilled_nll=nll(distilled),
        hard_labels_nll=nll(hard),
        distilled_kl=kl(distilled),
        hard_labels_kl=kl(hard),
    )


def nll(evaluation: DomainEvaluation | None) -> float | None:
    """The student's NLL, if it was measured and finite."""
    return finite(evaluation.student_nll) if evaluation else None


def kl(evaluation: DomainEvaluation | None) -> float | None:
    """KL(teacher || student), if it was measured and finite."""
    return finite(evaluation.kl) if evaluation else None


def _captured_mass(lines: tuple[StepMetrics, ...]) -> float | None:
    known = [(m.captured_mass, m.tokens) for m in lines if m.captured_mass is not None]
    tokens = sum(count for _, count in known)
    return sum(mass * count for mass, count in known) / tokens if tokens else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
