"""What a run measured over its steps, as plots with captions: the curves of report.html."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from cluster.report import plots
from cluster.report.plots import Series, Style
from cluster.report.record import RunRecord, finite
from shared.run.metrics import StepMetrics

WRITING, BALANCING = "waiting for text", "measuring the balance"


# Where the time of training goes, in the order of a step: seconds of a line.
PARTS: dict[str, Callable[[StepMetrics], float]] = {
    "waiting for the teacher": lambda m: m.teacher_wait_s,
    "forward and backward": lambda m: m.compute_s,
    "optimiser": lambda m: m.optimiser_s,
    BALANCING: lambda m: m.balancing_s,
    WRITING: lambda m: m.text_wait_s,
    "rest": lambda m: m.rest_s,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot over steps with its caption."""

    title: str
    unit: str
    plot: Markup
    by_domain: bool = False  # whether its colours are the domains'
    names: tuple[str, ...] = ()  # whose colours they are otherwise, for a legend


def curves(record: RunRecord) -> list[Curve]:
    """Everything measured over steps; neighbours share a line of the page."""
    norms, unit = [_series(record, "gradient norm", lambda m: m.grad_norm)], record.config.task.unit
    return [
        Curve(
            "Loss",
            f"nats per {unit}",
            _plot("Loss", _losses(record), from_zero=False),
        ),
        Curve("Gradient norm", "before clipping", _plot("Gradient norm", norms)),
        *_domain_curves(record),
        *_adaptive_curves(record),
        *_phase_curves(record),
        *_expert_curves(record),
        *_balance_curves(record),
        *_rollout_curves(record),
        *_teacher_curves(record),
        *_machine_curves(record),
    ]


def _losses(record: RunRecord) -> list[Series]:
    total = _series(record, "loss", lambda m: m.loss)
    if len(record.config.losses) == 1:
        return [total]
    names = dict.fromkeys(name for m in record.lines for name in m.terms)
    terms = [
        _series(record, name, lambda m, name=name: m.terms.get(name), colour=i)
        for i, name in enumerate(names)
    ]
    return [*terms, total]


def _domain_curves(record: RunRecord) -> list[Curve]:
    divergences = _by_domain(record, lambda m, name: m.domains[name].kl)
    shares = _by_domain(record, lambda m, name: m.domains[name].tokens / m.tokens, style="dots")
    weights = _plot("Domain weights", [*_targets(record), *shares], format_y=plots.percent)
    unit = "share of loss tokens; line: target, dots: drawn"
    found = [Curve("Domain weights", unit, weights, by_domain=True)]
    if any(series.points for series in divergences):
        plot = _plot("KL by domain", divergences)
        title = "KL by domain, training text"
        found.insert(0, Curve(title, "nats per token", plot, by_domain=True))
    if len(record.domains) > 1:
        plot = plots.area_plot(shares, label="Mixture", format_y=plots.percent)
        found.append(Curve("Mixture", "share of loss tokens drawn", plot, by_domain=True))
    return found


def _adaptive_curves(record: RunRecord) -> list[Curve]:
    """What a token-adaptive loss splits and learns, what a weighting leaves, and what is compared
    across tokenizers, by domain; nothing without any."""
    described = [
        ("Hard tokens by domain", "share of loss tokens", "hard_share", plots.percent),
        ("Uncertainty by domain", "1 - probability of the label", "uncertainty", plots.compact),
        ("TKD by domain", "nats per token", "tkd", plots.compact),
        ("DKD by domain", "nats per token", "dkd", plots.compact),
        ("Learnt by domain", "share of loss tokens", "selected_share", plots.percent),
        ("Compared by domain", "share of loss tokens", "compared_share", plots.percent),
        ("Weight by domain", "mean of what a token counts", "mean_weight", plots.compact),
        ("Teacher's confidence by domain", "0 to 1", "teacher_confidence", plots.compact),
        ("Student's uncertainty by domain", "0 to 1", "student_uncertainty", plots.compact),
        ("Teacher's NLL by domain", "nats per token", "teacher_nll", plots.compact),
        ("Changed by domain", "share of loss tokens", "changed_share", plots.percent),
        ("Changed and kept by domain", "share of loss tokens", "kept_share", plots.percent),
    ]
    curves = []
    for title, unit, field, format_y in described:
        series = _by_domain(record, lambda m, name, field=field: getattr(m.domains[name], field))
        if any(one.points for one in series):
            plot = _plot(title, series, format_y=format_y)
            curves.append(Curve(title, unit, plot, by_domain=True))
    return curves


def _phase_curves(record: RunRecord) -> list[Curve]:
    """What was decided about phases, and how far behind the teacher the student was then."""
    entries, curves = [e for e in record.log.entries if e.effective_from <= record.steps], []
    if record.config.progressive and entries:
        changes = [(float(e.effective_from), float(e.phase + 1)) for e in entries]
        changes.append((record.steps, entries[-1].phase + 1.0))
        series = Series("phase", tuple(changes), style="steps")
        curves.append(Curve("Phase", "parts of the text drawn from", _plot("Phase", [series])))
    gaps = [(e.decided_at, e.gap) for e in entries if finite(e.gap) is not None]
    if len(gaps) > 1:
        series = Series("gap", tuple((float(step), gap or 0.0) for step, gap in gaps))
        plot = _plot("Gap to the teacher", [series], from_zero=False)
        curves.append(Curve("Gap to the teacher", "validation NLL above the teacher's", plot))
    return curves


def _balance_curves(record: RunRecord) -> list[Curve]:
    """How far the steps of what sees and what says move a student; nothing where that is not
    measured."""
    if not any(line.balance for line in record.lines):
        return []
    kappa = _series(record, "kappa", lambda m: m.balance and m.balance.kappa)
    sides = [
        _series(record, "vision", lambda m: m.balance and m.balance.vision_factor, colour=0),
        _series(record, "language", lambda m: m.balance and m.balance.language_factor, colour=1),
    ]
    return [
        Curve(
            "Balance",
            "KL of the vision part's step over the language part's",
            _plot("Balance", [kappa]),
        ),
        Curve(
            "Learning rates",
            "what each part's is multiplied by",
            _plot("Learning rates", sides),
            names=("vision", "language"),
        ),
    ]


def _expert_curves(record: RunRecord) -> list[Curve]:
    """How evenly a mixture's experts were used; nothing where no routers are balanced."""
    load = _series(record, "busiest expert", lambda m: m.experts and m.experts.max_load)
    if not load.points:
        return []
    evenness = _series(record, "evenness", lambda m: m.experts and m.experts.entropy)
    return [
        Curve("Busiest expert", "its tokens, in even shares", _plot("Busiest expert", [load])),
        Curve(
            "Evenness of experts",
            "entropy of their shares, over that of even ones; mean over layers",
            _plot("Evenness of experts", [evenness], format_y=plots.percent),
        ),
    ]


def _rollout_curves(record: RunRecord) -> list[Curve]:
    """What the student wrote itself and learnt from; nothing where it wrote nothing."""
    if not any(m.rollouts for m in record.lines):
        return []
    shares: dict[str, Callable[[StepMetrics], float | None]] = {
        "written": lambda m: m.rollouts and _share(m.rollouts.tokens, m.tokens),
        "ended by itself": lambda m: m.rollouts and m.rollouts.ended,
    }
    series = [_series(record, *each, colour=i) for i, each in enumerate(shares.items())]
    ratio = _series(record, "ratio", lambda m: m.rollouts and m.rollouts.importance_ratio)
    return [
        Curve(
            "Text of its own",
            "share of loss tokens that the student wrote, and of its texts that ended",
            _plot("Text of its own", series, format_y=plots.percent),
            names=tuple(shares),
        ),
        Curve(
            "Importance ratio",
            "probability of what it wrote, when learnt over when written",
            _plot("Importance ratio", [ratio], from_zero=False),
        ),
    ]


def _machine_curves(record: RunRecord) -> list[Curve]:
    speed = [_series(record, "tokens/s", lambda m: m.tokens_per_s)]
    curves = [Curve("Speed", "loss tokens per second", _plot("Speed", speed))]
    if any(m.units for m in record.lines):
        waits = [_series(record, "waiting", _wait)]
        plot = _plot("Waiting for the teacher", waits, format_y=plots.percent)
        curves.append(Curve("Waiting for the teacher", "share of training time", plot))
    if any(m.compute_s for m in record.lines):
        rare = (WRITING, BALANCING)
        names = tuple(n for n, of in PARTS.items() if n not in rare or any(map(of, record.lines)))
        parts = [
            _series(record, n, lambda m, spent=PARTS[n]: _share(spent(m), m.seconds), colour=i)
            for i, n in enumerate(names)
        ]
        plot = plots.area_plot(parts, label="Where the time went", format_y=plots.percent)
        curves.append(Curve("Where the time went", "share of training time", plot, names=names))
    return curves


def _teacher_curves(record: RunRecord) -> list[Curve]:
    """What is measured of each of several teachers; nothing of the only one."""
    names = tuple(record.config.teachers)
    if len(names) == 1:
        return []
    described: list[tuple[str, str, Callable[[StepMetrics, str], float | None]]] = [
        ("KL by teacher", "nats per token of its domains", lambda m, name: m.teachers[name].kl),
        ("Waiting by teacher", "share of training time", _wait_for),
        ("Bytes by teacher", "per loss token of its domains", _bytes_of),
    ]
    formats = {"Waiting by teacher": plots.percent}
    curves = []
    for title, unit, value in described:
        series = [_of_teacher(record, name, value, colour=i) for i, name in enumerate(names)]
        if any(one.points for one in series):
            plot = _plot(title, series, format_y=formats.get(title, plots.compact))
            curves.append(Curve(title, unit, plot, names=names))
    return curves


def _of_teacher(
    record: RunRecord,
    name: str,
    value: Callable[[StepMetrics, str], float | None],
    *,
    colour: int,
) -> Series:
    def known(line: StepMetrics) -> float | None:
        return value(line, name) if name in line.teachers else None

    return _series(record, name, known, colour=colour)


def _wait_for(line: StepMetrics, name: str) -> float | None:
    return _share(line.teachers[name].wait_s, line.seconds)


def _bytes_of(line: StepMetrics, name: str) -> float | None:
    asked = line.teachers[name]
    return _share(asked.wire_bytes, asked.tokens)


def _wait(line: StepMetrics) -> float | None:
    return _share(line.teacher_wait_s, line.seconds)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _plot(
    title: str,
    series: list[Series],
    *,
    format_y: Callable[[float], str] = plots.compact,
    from_zero: bool = True,
) -> Markup:
    return plots.line_plot(series, label=title, format_y=format_y, from_zero=from_zero)


def _series(
    record: RunRecord,
    name: str,
    value: Callable[[StepMetrics], float | None],
    *,
    colour: int = -1,
) -> Series:
    points = ((m.step, finite(value(m))) for m in record.lines)
    return Series(name, tuple((x, y) for x, y in points if y is not None), colour)


def _by_domain(
    record: RunRecord,
    value: Callable[[StepMetrics, str], float | None],
    *,
    style: Style = "line",
) -> list[Series]:
    all_series = []
    for colour, name in enumerate(record.domains):
        known = [m for m in record.lines if name in m.domains and m.tokens]
        points = ((m.step, finite(value(m, name))) for m in known)
        kept = tuple((x, y) for x, y in points if y is not None)
        all_series.append(Series(name, kept, colour, style))
    return all_series


def _targets(record: RunRecord) -> list[Series]:
    """The weight log as steps, up to the last step done."""
    entries = [e for e in record.log.entries if e.effective_from <= record.steps]
    return [
        Series(
            f"{name} (target)",
            (
                *((e.effective_from, e.weights[i]) for e in entries),
                *((record.steps, e.weights[i]) for e in entries[-1:]),
            ),
            i,
            "steps",
        )
        for i, name in enumerate(record.domains)
    ]
