"""report.html: one self-contained page about a run, finished or under way.

No scripts, no network: plots are inline SVG and the page forbids loading anything. Reads the run
directory alone, so it can be written anywhere and at any time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from cluster.report import plots
from cluster.report.classes import class_table
from cluster.report.curves import curves
from cluster.report.measurement import DomainSummary, Failures, failures_in, kl, measure, nll
from cluster.report.plots import Mark, Shape
from cluster.report.record import RunRecord, finite, read_record
from cluster.report.samples import samples_of
from cluster.report.services import read_scaling
from cluster.report.summary import verdict
from cluster.report.text import COLUMNS
from shared.prompts.prompts import Prompt
from shared.run.run_dir import RunDir, damaged, read_written, write_atomically

TEMPLATES = Path(__file__).parent / "templates"
# Read when imported: a submitted job's folder may be gone by the time a run ends.
ENVIRONMENT = Environment(
    loader=DictLoader({file.name: file.read_text() for file in TEMPLATES.iterdir()}),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def template(name: str) -> Template:
    """A page's template."""
    return ENVIRONMENT.get_template(name)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path; replaces an older one whole."""
    page = _page(read_record(run_dir))
    path = RunDir(run_dir).report
    write_atomically(path, page)
    return path


def _page(record: RunRecord) -> str:
    files = RunDir(record.directory)
    told = read_written(files.summary)
    retried = sum(m.retried_units for m in record.lines)
    counted = Failures(teacher_restarts=0, student_restarts=0, retried_units=retried)
    summary = measure(
        record,
        status=told.get("status", "unfinished"),
        failures=failures_in(files.summary, told, counted),
    )
    hard = record.baseline.after if record.baseline else {}
    return template("report.html.j2").render(
        record=record,
        config=record.config,
        summary=summary,
        verdict=verdict(record),
        hard={name: (nll(hard.get(name)), kl(hard.get(name))) for name in record.domains},
        gap_closed={name: gap_closed(domain) for name, domain in summary["domains"].items()},
        comparisons=_comparisons(record),
        classes=class_table(record),
        prompts=_prompts(files.prompts),
        samples=samples_of(files.generations, record.domains),
        curves=curves(record),
        scaling=read_scaling(files.scaling),
        workers=_workers(record),
        retries=[(m.step, m.retried_units) for m in record.lines if m.retried_units],
        text_columns=COLUMNS,
        text_notes=_text_notes(record),
        swatch=plots.swatch,
        shape=plots.shape_swatch,
        config_text=_text(files.config),
        environment_text=_text(files.environment),
    )


def _text_notes(record: RunRecord) -> list[str]:
    """What was said of each domain's text before the run, and of its validation text."""
    return [
        f"{name}{part}: {note}"
        for name, text in (record.text or {}).items()
        for part, told in (("", text), (", validation", text.get("validation", {})))
        for note in told.get("notes", [])
    ]


def _workers(record: RunRecord) -> list[tuple[int, int]]:
    """First steps and numbers of workers, wherever these changed; empty where none is known."""
    found: list[tuple[int, int]] = []
    first = 1
    for line in record.lines:
        if line.workers is not None and (not found or found[-1][1] != line.workers):
            found.append((first, line.workers))
        first = line.step + 1
    return found


def gap_closed(domain: DomainSummary) -> float | None:
    """The share of the student's distance to its teacher, in NLL on validation text, that training
    took away; None where the teacher is not ahead, or something is not known."""
    teacher, before = domain["teacher_nll"], domain["student_nll_before"]
    after = domain["student_nll_after"]
    if teacher is None or before is None or after is None or teacher >= before:
        return None
    return (before - after) / (before - teacher)


def _prompts(path: Path) -> dict[str, dict[str, Any]]:
    """What prompts.json says of each domain: its prompt as text, and what the search tried."""
    told = read_written(path).get("domains", {})
    try:
        return {
            name: found | {"text": Prompt.from_dict(found["prompt"]).text()}
            for name, found in told.items()
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        why = f"its domains have no prompts ({type(error).__name__}: {error})"
        raise damaged(path, why) from None


def _comparisons(record: RunRecord) -> list[tuple[str, Markup]]:
    """Before and after per domain, as titled plots: NLL, and KL where a teacher answered."""
    unit = f"nats per {record.config.task.unit}"
    plotted = [("NLL", _marks(record, nll, teacher=True))]
    if any(kl(evaluation) is not None for evaluation in record.before.values()):
        plotted.append(("KL to the teacher", _marks(record, kl, teacher=False)))
    return [
        (
            f"{title} on validation text",
            plots.row_plot(rows, label=f"{title} per domain", x_label=unit),
        )
        for title, rows in plotted
    ]


def _marks(record: RunRecord, measured: Callable, *, teacher: bool) -> dict[str, list[Mark]]:
    rows: dict[str, list[Mark]] = {}
    for name in record.domains:
        known = record.after.get(name) or record.before.get(name)
        hard = record.baseline.after.get(name) if record.baseline else None
        values = [
            Mark("teacher", teacher_nll, "bar")
            if teacher and known and (teacher_nll := finite(known.teacher_nll)) is not None
            else None,
            _mark("before", measured(record.before.get(name)), "hollow"),
            _mark("hard labels", measured(hard), "diamond"),
            _mark("after", measured(record.after.get(name)), "filled"),
        ]
        rows[name] = [mark for mark in values if mark]
    return rows


def _mark(label: str, value: float | None, shape: Shape) -> Mark | None:
    return None if value is None else Mark(label, value, shape)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
