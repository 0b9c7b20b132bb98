"""Where results lie in the project, and the section of `RESULTS.md` that shows them.

`results/records.json` holds what the cells recorded, the other files are made from it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from shared.run.run_dir import write_atomically
from tests.benchmarks.methods.cells import (
    KD,
    SPARSE,
    SPARSE_COMPARISONS,
    SWEPT_COMPARISONS,
    UNWEIGHTED,
    WEIGHTED,
    WEIGHTED_COMPARISONS,
    Cell,
)
from tests.benchmarks.methods.plot import recovered_plot
from tests.benchmarks.methods.statistics import Record
from tests.benchmarks.methods.table import (
    differences_table,
    domains_table,
    methods_table,
    on_policy_differences,
    on_policy_table,
    positions_table,
    selectors_table,
    sweeps_table,
    weights_table,
)

RESULTS = Path(__file__).parent / "results"
RECORDS, PAGE, PLOT = RESULTS / "records.json", RESULTS / "results.md", RESULTS / "results.svg"
DOCUMENT = Path(__file__).resolve().parents[1] / "RESULTS.md"
HEADER = 2  # lines of a table that says nothing yet
LEFT_OUT = ("losses",)  # of a record: long, and in no table


def read_records(folder: Path) -> list[Record]:
    """What the cells of a run's folder recorded, in order of name and seed."""
    records = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    return sorted(records, key=lambda record: (record["cell"], record["seed"]))


def publish(found: Sequence[Record]) -> None:
    """Write results into the project, in place of those of the same cells and seeds."""
    RESULTS.mkdir(exist_ok=True)
    known = {(record["cell"], record["seed"]): record for record in (*published(), *found)}
    records = [known[key] for key in sorted(known)]
    kept = [{k: v for k, v in record.items() if k not in LEFT_OUT} for record in records]
    lines = ",\n".join(json.dumps(record) for record in kept)
    write_atomically(RECORDS, f"[\n{lines}\n]\n")
    write_atomically(PAGE, page(records))
    write_atomically(PLOT, recovered_plot(apart(records)[1]))
    write_atomically(DOCUMENT, with_sections(DOCUMENT.read_text(), records))


def published() -> list[Record]:
    """The records in the project, in order of name and seed."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def page(records: Sequence[Record]) -> str:
    """Everything, as Markdown."""
    own, others = apart(records)
    parts = {
        "Methods": methods_table(_on_a_quiet_machine(others)),
        "Differences, paired by seed": differences_table(others),
        "Recovered share by domain": domains_table(others),
        "Domain weights: mean, and range over decisions": weights_table(others),
        "Sweeps": sweeps_table(records),
        "Students of each selector": selectors_table(others),
        "Weights of tokens and documents": _weighting(others),
        "Mixtures of experts": _sparse(others),
        "Differences in other circumstances, paired by seed": differences_table(
            others, SWEPT_COMPARISONS
        ),
        "The student's own text": on_policy_table(own),
        "KL by position of the student's own text": positions_table(own),
        "Differences of the student's own text, paired by seed": on_policy_differences(own),
    }
    told = {title: table for title, table in parts.items() if table.count("\n") > HEADER}
    return "\n".join(f"## {title}\n\n{table}" for title, table in told.items())


def apart(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records of the on-policy table, whose students were made to write, and all others."""
    own = [record for record in records if "written" in record]
    return own, [record for record in records if "written" not in record]


def sections(records: Sequence[Record]) -> dict[str, str]:
    """The parts of `RESULTS.md` by the names of their marks."""
    own, others = apart(records)
    plain = _on_a_quiet_machine(others)
    plot = PLOT.relative_to(DOCUMENT.parent)
    image = f"![Share of the gap that each method recovers]({plot})\n"
    return {
        "results": "\n".join([methods_table(plain), image, differences_table(plain)]),
        "weighting": _weighting(others),
        "sparse": _sparse(others),
        "on-policy": "\n".join(
            table
            for table in (on_policy_table(own), positions_table(own), on_policy_differences(own))
            if table.count("\n") > HEADER
        ),
    }


def _on_a_quiet_machine(records: Sequence[Record]) -> list[Record]:
    """Without those whose times were measured beside other work."""
    others = {cell.name for cell in (*WEIGHTED, *SPARSE)}
    return [record for record in records if record["cell"] not in others]


def _weighting(records: Sequence[Record]) -> str:
    return _compared(records, (*UNWEIGHTED, *WEIGHTED), WEIGHTED_COMPARISONS)


def _sparse(records: Sequence[Record]) -> str:
    return _compared(records, (KD, *SPARSE), SPARSE_COMPARISONS)


def _compared(
    records: Sequence[Record], cells: Sequence[Cell], comparisons: Sequence[tuple[str, str]]
) -> str:
    return "\n".join([methods_table(records, cells), differences_table(records, comparisons)])


def with_sections(document: str, records: Sequence[Record]) -> str:
    """The document with other results between its marks."""
    for name, text in sections(records).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, begins, rest = document.partition(begin)
        _, ends, after = rest.partition(end)
        assert begins, f"the document has marks for {name}"
        assert ends, f"its {name} end somewhere"
        document = before + begin + text + end + after
    return document
