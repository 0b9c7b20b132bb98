"""Records of cells as Markdown: every method, every comparison, every domain, every sweep."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from tests.benchmarks.methods.cells import (
    CELLS,
    COMPARISONS,
    MINUS,
    ON_POLICY,
    ON_POLICY_COMPARISONS,
    SELECTED,
    SWEEPS,
    Cell,
    every_cell,
)
from tests.benchmarks.methods.statistics import (
    Estimate,
    Measure,
    Record,
    calibration,
    estimate,
    mean_kl,
    mean_recovered,
    paired,
    recovered_in,
    teacher_seconds_per_token,
    worst_gap,
)

MEASURES: tuple[tuple[str, Measure], ...] = (
    ("recovered share", mean_recovered),
    ("KL to teacher", mean_kl),
    ("worst gap", worst_gap),
)


WRITTEN = (
    ("exact match", "exact_match"),
    ("token F1", "token_f1"),
    ("pass@1", "pass_1"),
    ("pass@8", "pass_8"),
    ("distinct-2", "distinct_2"),
    ("tokens", "tokens"),
    ("ends by itself", "ended"),
)
AROUND = {"before": "the student before", "teacher": "the teacher"}
COMPARED = (WRITTEN[0], *WRITTEN[2:4])


def methods_table(records: Sequence[Record], cells: Iterable[Cell] = CELLS) -> str:
    """One line per method: means over seeds with intervals, and what it cost."""
    header = ["method", *(name for name, _ in MEASURES)]
    header += ["tokens", "student CPU s", "teacher CPU s", "policy CPU s"]
    return markdown(header, _method_lines(cells, records))


def sweeps_table(records: Sequence[Record]) -> str:
    """The same numbers for the cells that explain the others."""
    header = ["sweep", "cell", "seeds", *(name for name, _ in MEASURES)]
    lines = []
    for sweep, cells in SWEEPS.items():
        for cell in cells:
            own = of_cell(records, cell)
            if own:
                values = [level(estimate([measure(r) for r in own])) for _, measure in MEASURES]
                lines.append([sweep, cell.title, str(len(own)), *values])
    return markdown(header, lines)


def selectors_table(records: Sequence[Record]) -> str:
    """Students that differ in the ids they learnt from; only records that hold all measures."""
    header = ["selector", "seeds", *(name for name, _ in MEASURES), "calibration error"]
    measures = (*(measure for _, measure in MEASURES), calibration)
    lines = []
    for title, cell in SELECTED.items():
        own = [r for r in records if r["cell"] == cell and "calibration_error" in r]
        if own:
            values = [level(estimate([measure(r) for r in own])) for measure in measures]
            lines.append([title, str(len(own)), *values])
    return markdown(header, lines)


def differences_table(
    records: Sequence[Record], comparisons: Iterable[tuple[str, str]] = COMPARISONS
) -> str:
    """One line per comparison; bold where the interval leaves 0 out."""
    titles = {name: cell.title for name, cell in every_cell().items()}
    header = ["difference", *(name for name, _ in MEASURES)]
    lines = []
    for cell, against in comparisons:
        found = [paired(records, cell, against, measure) for _, measure in MEASURES]
        if all(found):
            name = f"{titles[cell]} {MINUS} {titles[against]}"
            lines.append([name, *(difference(value) for value in found if value)])
    return markdown(header, lines)


def domains_table(records: Sequence[Record]) -> str:
    """The recovered share of each domain."""
    names = list(records[0]["domains"]) if records else []

    def values(own: Sequence[Record]) -> list[str]:
        return [level(estimate([recovered_in(name)(r) for r in own])) for name in names]

    return markdown(["method", *names], _lines(CELLS, records, values))


def weights_table(records: Sequence[Record]) -> str:
    """The domain weights over the run, mean over the decisions and seeds, and the extremes."""
    names = list(records[0]["domains"]) if records else []

    def values(own: Sequence[Record]) -> list[str]:
        cells = []
        for index in range(1, len(names) + 1):
            weights = [entry[index] for record in own for entry in record["weights"]]
            mean = sum(weights) / len(weights)
            cells.append(f"{mean:.2f} ({min(weights):.2f} to {max(weights):.2f})")
        return cells

    return markdown(["method", *names], _lines(CELLS, records, values))


def on_policy_table(records: Sequence[Record]) -> str:
    """One line per cell of the student's own text: how near it is to the teacher on validation
    text, and what it writes; the student as it began and the teacher last."""
    header = ["method", "NLL", "KL to teacher", *(title for title, _ in WRITTEN), "CPU s"]
    lines = _lines(ON_POLICY, records, lambda own: _on_policy_values(own, records))
    for model, title in AROUND.items() if records else ():
        values = [f"{_of_written(records[0], model, name):.3f}" for _, name in WRITTEN]
        lines.append([title, *_levels(records[0], model), *values, ""])
    return markdown(header, lines)


def _levels(record: Record, model: str) -> list[str]:
    """NLL and KL of the teacher or the student as it began."""
    nll = "teacher_nll" if model == "teacher" else "nll_before"
    domains = list(record["domains"].values())
    kl = 0.0 if model == "teacher" else np.mean([domain["kl_before"] for domain in domains])
    return [f"{np.mean([domain[nll] for domain in domains]):.3f}", f"{kl:.3f}"]


def on_policy_differences(records: Sequence[Record]) -> str:
    """One line per comparison of the on-policy table."""
    measures = (mean_kl, *(partial(_of_written, model="student", name=n) for _, n in COMPARED))
    titles = {cell.name: cell.title for cell in ON_POLICY}
    lines = []
    for cell, against in ON_POLICY_COMPARISONS:
        found = [paired(records, cell, against, measure) for measure in measures]
        if all(found):
            name = f"{titles[cell]} {MINUS} {titles[against]}"
            lines.append([name, *(difference(value) for value in found if value)])
    return markdown(["difference", "KL to teacher", *(title for title, _ in COMPARED)], lines)


def _on_policy_values(own: Sequence[Record], records: Sequence[Record]) -> list[str]:
    nll = [np.mean([d["nll_after"] for d in record["domains"].values()]) for record in own]
    kl = [mean_kl(record) for record in own]
    written = [[_of_written(record, "student", name) for record in own] for _, name in WRITTEN]
    levels = [level(estimate(values)) for values in (nll, kl, *written)]
    return [*levels, f"{np.mean([_cpu_s(record, records) for record in own]):.0f}"]


def _cpu_s(record: Record, records: Sequence[Record]) -> float:
    """Of training and the teacher. What it says of the text comes from a store that all cells
    share: that counts as what it says of own text costs it."""
    training, teacher = (record["cpu_s"][name] for name in ("training", "teacher"))
    asks = any(loss["kind"] != "cross_entropy" for loss in record["config"]["losses"])
    if asks and not teacher:
        own = [r for r in records if (r["config"].get("source") or {}).get("student") == 1]
        teacher = record["tokens"] * teacher_seconds_per_token(own)
    return training + teacher


def positions_table(records: Sequence[Record]) -> str:
    """How far student and teacher are apart at each token of what the student writes, by task."""
    known = [record for record in records if "kl_by_position" in record["written"]]
    names = list(known[0]["domains"]) if known else []
    most = max(
        (len(kls) for record in known for kls in record["written"]["kl_by_position"].values()),
        default=0,
    )

    def line(own: Sequence[Record]) -> list[str]:
        cells = []
        for name in names:
            by_seed = [record["written"]["kl_by_position"][name] for record in own]
            for position in range(most):
                at = [kls[position] for kls in by_seed if position < len(kls)]
                cells.append(level(estimate(at)) if at else "")
        return cells

    header = ["method", *(f"{name}, {n + 1}" for name in names for n in range(most))]
    return markdown(header, _lines(ON_POLICY, known, line))


def _of_written(record: Record, model: str, name: str) -> float:
    """Mean over domains of what a model wrote."""
    return float(np.mean([domain[name] for domain in record["written"][model].values()]))


def of_cell(records: Iterable[Record], cell: Cell) -> list[Record]:
    """The records of a cell, by seed."""
    return sorted((r for r in records if r["cell"] == cell.name), key=lambda r: r["seed"])


def _method_lines(cells: Iterable[Cell], records: Sequence[Record]) -> list[list[str]]:
    def values(own: Sequence[Record]) -> list[str]:
        def mean(measure: Measure) -> float:
            return estimate([measure(record) for record in own]).mean

        tokens, training = mean(lambda r: r["tokens"]), mean(lambda r: r["cpu_s"]["training"])
        asks = any(loss["kind"] != "cross_entropy" for loss in own[0]["config"]["losses"])
        alike = [r for r in records if _shown(r) == _shown(own[0])]
        teacher = tokens * teacher_seconds_per_token(alike) if asks else 0.0
        decisions = mean(lambda r: r["cpu_s"]["decisions"])
        extra = f" ({decisions / (training + teacher):.0%})" if decisions else ""
        levels = [level(estimate([measure(r) for r in own])) for _, measure in MEASURES]
        costs = [f"{tokens / 1000:.0f} k", f"{training:.0f}", f"{teacher:.0f}"]
        return [*levels, *costs, f"{decisions:.0f}{extra}"]

    return _lines(cells, records, values)


def _shown(record: Record) -> str | None:
    """The prompts of a cell; the config of an older record may not name the option."""
    return record["config"].get("prompts")


def _lines(
    cells: Iterable[Cell],
    records: Sequence[Record],
    values: Callable[[Sequence[Record]], list[str]],
) -> list[list[str]]:
    """A line for each cell that has records."""
    found = ((cell, of_cell(records, cell)) for cell in cells)
    return [[cell.title, *values(own)] for cell, own in found if own]


def level(value: Estimate) -> str:
    """A number and its interval."""
    if value.num_seeds < 2:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} \u00b1 {value.half_width:.3f}"


def difference(value: Estimate) -> str:
    """A signed number and its interval, bold where that leaves 0 out."""
    text = f"{value.mean:+.3f}".replace("-", MINUS)
    if value.num_seeds < 2:
        return text
    text += f" \u00b1 {value.half_width:.3f}"
    return f"**{text}**" if value.excludes_zero else text


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"
