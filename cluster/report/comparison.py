"""Runs beside each other: what differs between their configs, and what each gave and cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.report import plots
from cluster.report.curves import Curve
from cluster.report.measurement import Failures, Summary, kl, measure, nll
from cluster.report.page import template
from cluster.report.plots import Series
from cluster.report.record import RunRecord, finite, read_record
from shared.config.paths import JOB_FOLDERS
from shared.config.run import Config
from shared.errors import ConfigError
from shared.in_words import shortened
from shared.run.changes import leaves
from shared.run.metrics import DomainEvaluation, StepMetrics
from shared.run.run_dir import RunDir, read_written, write_atomically

CELL_WIDTH, VALUE_CHARS = 12, 60
NO_FAILURES = Failures(teacher_restarts=0, student_restarts=0, retried_units=0)
HIDDEN = ("name", "paths", "log_every", "checkpoints", "prompts", "prompt_search", "baseline")
MEASURED: dict[str, Callable[[DomainEvaluation | None], float | None]] = {
    "NLL": nll,
    "KL to the teacher": kl,
}
COSTS: dict[str, Callable[[Summary], str]] = {
    "status": lambda s: s["status"],
    "steps": lambda s: f"{s['steps']:,}",
    "loss tokens": lambda s: f"{s['tokens']:,}",
    "tokens/s": lambda s: f"{s['tokens_per_s']:,.0f}",
    "teacher wait": lambda s: f"{s['teacher_wait_fraction']:.1%}",
    "bytes per token": lambda s: f"{s['wire_bytes_per_token']:,.0f}",
    "cache hits": lambda s: f"{s['cache_hit_rate']:.1%}",
}


@dataclass(frozen=True, slots=True)
class Compared:
    """Runs under names that tell them apart."""

    runs: dict[str, RunRecord]

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain of any run, in the order in which it is first met."""
        return tuple(dict.fromkeys(d for record in self.runs.values() for d in record.domains))

    def differing(self) -> dict[str, list[str]]:
        """Options that are not alike in all runs, with each run's value as text; of a domain that
        some runs lack, its training text."""
        told = _alike([record.config for record in self.runs.values()])
        for of_run in told:
            for domain in of_run["domains"]:
                if any(domain not in other["domains"] for other in told):
                    of_run["domains"][domain] = of_run["domains"][domain]["train"]
        options = [dict(leaves(of_run)) for of_run in told]
        names = dict.fromkeys(name for of_run in options for name in of_run)
        values = {name: [_value(of_run, name) for of_run in options] for name in names}
        return {
            name: texts
            for name, texts in values.items()
            if len(set(texts)) > 1 and name.split(".")[0] not in HIDDEN
        }

    def after(
        self, measured: Callable[[DomainEvaluation | None], float | None], domain: str
    ) -> list[float | None]:
        """What each run's student has on a domain's validation text after training."""
        return [measured(record.after.get(domain)) for record in self.runs.values()]

    def unlike(self) -> list[str]:
        """Domains whose validation text is not the same in all runs that have measured it."""
        counts = {
            domain: {r.after[domain].tokens for r in self.runs.values() if domain in r.after}
            for domain in self.domains
        }
        return [domain for domain, tokens in counts.items() if len(tokens) > 1]

    def costs(self) -> dict[str, list[str]]:
        """How far each run came, and at which price."""
        found = [_summary(record) for record in self.runs.values()]
        return {name: [cell(summary) for summary in found] for name, cell in COSTS.items()}

    def curves(self) -> list[Curve]:
        """Loss, and KL of each domain on training text, a colour for each run."""
        names = tuple(self.runs)
        losses = self._series(lambda line: line.loss)
        found = [Curve("Loss", "nats per token", _plot("Loss", losses), names=names)]
        for domain in self.domains:
            series = self._series(lambda m, d=domain: m.domains[d].kl if d in m.domains else None)
            if any(one.points for one in series):
                title = f"KL, {domain}"
                found.append(Curve(title, "nats per token", _plot(title, series), names=names))
        return found

    def _series(self, value: Callable[[StepMetrics], float | None]) -> list[Series]:
        found = []
        for colour, (name, record) in enumerate(self.runs.items()):
            points = ((line.step, finite(value(line))) for line in record.lines)
            found.append(Series(name, tuple((x, y) for x, y in points if y is not None), colour))
        return found


def _alike(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """The options of configs; beside those of a job, whose root was a folder that Ray made, paths
    are as they are below the root of each."""
    in_a_job = any(JOB_FOLDERS in config.paths.root for config in configs)

    def below(value: Any, root: str) -> Any:
        if isinstance(value, dict):
            return {name: below(one, root) for name, one in value.items()}
        if isinstance(value, list):
            return [below(one, root) for one in value]
        return value.removeprefix(f"{root}/") if isinstance(value, str) else value

    told = [(config.model_dump(mode="json"), config.paths.root) for config in configs]
    return [below(options, root) if in_a_job else options for options, root in told]


def compare(folders: Sequence[Path]) -> Compared:
    """Read runs. Raises ConfigError for a folder named twice or one that holds no run."""
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{place} is named twice; a run is compared with others")
    records = [read_record(place) for place in places]
    short = [record.config.name for record in records]
    names = [
        name if short.count(name) == 1 else f"{place.parent.name}/{place.name}"
        for name, place in zip(short, places, strict=True)
    ]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    return Compared(dict(zip(names, records, strict=True)))


def write_comparison(compared: Compared, to: Path) -> None:
    """Write one self-contained page. Raises ConfigError for a file that is none, StorageError."""
    if to.suffix != ".html":
        raise ConfigError(f"--to is {to}, and what is written is a page; name a file NAME.html")
    page = template("comparison.html.j2").render(
        compared=compared, measured=MEASURED, swatch=plots.swatch
    )
    write_atomically(to, page)


def comparison_table(compared: Compared) -> str:
    """The same for a terminal: what differs, what each student has after training, the costs."""
    names = tuple(compared.runs)
    blocks = [_block("option", compared.differing(), names)] if compared.differing() else []
    for title, measured in MEASURED.items():
        rows = {d: [_number(v) for v in compared.after(measured, d)] for d in compared.domains}
        if any(cell != "-" for cells in rows.values() for cell in cells):
            said = f"{title} on validation text after training, nats per token; lower is better."
            blocks.append([said, *_block("domain", rows, names)])
    blocks.append(_block("", compared.costs(), names))
    if unlike := compared.unlike():
        blocks.append([f"Not the same validation text in every run: {', '.join(unlike)}."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _block(first: str, rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    left = min(VALUE_CHARS, max(len(first), *map(len, rows)))
    widths = [
        min(40, max(CELL_WIDTH, len(name), *(len(cells[i]) for cells in rows.values())))
        for i, name in enumerate(names)
    ]

    def line(title: str, cells: Sequence[str]) -> str:
        shown = [shortened(c, w).rjust(w) for c, w in zip(cells, widths, strict=True)]
        return "  ".join([shortened(title, left).ljust(left), *shown])

    return [line(first, names), *(line(title, cells) for title, cells in rows.items())]


def _summary(record: RunRecord) -> Summary:
    told = read_written(RunDir(record.directory).summary)
    status = told.get("status", "unfinished")
    return measure(record, status=status, failures=told.get("failures", NO_FAILURES))


def _plot(title: str, series: list[Series]) -> plots.Markup:
    return plots.line_plot(series, label=title, from_zero=False)


def _value(options: Mapping[str, Any], name: str) -> str:
    return shortened("-" if name not in options else str(options[name]), VALUE_CHARS)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
