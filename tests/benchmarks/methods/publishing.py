"""Where results lie in the project, and the section of `RESULTS.md` that shows them.

`results/records.json` holds what the cells recorded, the other files are made from it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from shared.run.run_dir import write_atomically
from tests.benchmarks.methods.cells import SWEPT_COMPARISONS
from tests.benchmarks.methods.plot import recovered_plot
from tests.benchmarks.methods.statistics import Record
from tests.benchmarks.methods.table import (
    differences_table,
    domains_table,
    methods_table,
    selectors_table,
    sweeps_table,
    weights_table,
)

RESULTS = Path(__file__).parent / "results"
RECORDS, PAGE, PLOT = RESULTS / "records.json", RESULTS / "results.md", RESULTS / "results.svg"
DOCUMENT = Path(__file__).resolve().parents[1] / "RESULTS.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
HEADER = 2  # lines of a table that says nothing yet
LEFT_OUT = ("losses",)  # of a record: long, and in no table


def read_records(folder: Path) -> list[Record]:
    """What the cells of a run's folder recorded, in order of name and seed."""
    records = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    return sorted(records, key=lambda record: (record["cell"], record["seed"]))


def publish(records: Sequence[Record]) -> None:
    """Write all results into the project."""
    RESULTS.mkdir(exist_ok=True)
    kept = [{k: v for k, v in record.items() if k not in LEFT_OUT} for record in records]
    lines = ",\n".join(json.dumps(record) for record in kept)
    write_atomically(RECORDS, f"[\n{lines}\n]\n")
    write_atomically(PAGE, page(records))
    write_atomically(PLOT, recovered_plot(records))
    write_atomically(DOCUMENT, with_section(DOCUMENT.read_text(), section(records)))


def published() -> list[Record]:
    """The records in the project."""
    return json.loads(RECORDS.read_text())


def page(records: Sequence[Record]) -> str:
    """Everything, as Markdown."""
    parts = {
        "Methods": methods_table(records),
        "Differences, paired by seed": differences_table(records),
        "Recovered share by domain": domains_table(records),
        "Domain weights: mean, and range over decisions": weights_table(records),
        "Sweeps": sweeps_table(records),
        "Students of each selector": selectors_table(records),
        "Differences in other circumstances, paired by seed": differences_table(
            records, SWEPT_COMPARISONS
        ),
    }
    told = {title: table for title, table in parts.items() if table.count("\n") > HEADER}
    return "\n".join(f"## {title}\n\n{table}" for title, table in told.items())


def section(records: Sequence[Record]) -> str:
    """The part of `RESULTS.md` between its marks."""
    plot = PLOT.relative_to(DOCUMENT.parent)
    image = f"![Share of the gap that each method recovers]({plot})\n"
    return "\n".join([methods_table(records), image, differences_table(records)])


def with_section(document: str, text: str) -> str:
    """The document with other results."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "the document has marks for results"
    assert end, "its results end somewhere"
    return before + begin + text + end + after
