"""The tables of `RESULTS.md`, from the records in the project."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.run.run_dir import write_atomically
from tests.benchmarks.methods.statistics import Record, estimate
from tests.benchmarks.methods.table import difference, level, markdown
from tests.benchmarks.outcomes.trials import TABLES, Table

RECORDS = Path(__file__).with_name("records.json")
DOCUMENT = Path(__file__).resolve().parents[1] / "RESULTS.md"


def text_of(table: Table, records: Sequence[Record]) -> str:
    """The Markdown of a table: each trial's students and their difference, then trials compared."""
    header = ["student", "measure", "teacher", table.baseline, table.student, "difference"]
    lines = [
        [trial.title, title, *_line(of_trial(records, trial.name), key)]
        for trial in table.trials
        for title, key in table.measures.items()
        if of_trial(records, trial.name)
    ]
    header_2 = [f"difference of the {table.student}", *table.measures]
    pairs = list(_compared(table, records))
    return "\n".join([markdown(header, lines), *([markdown(header_2, pairs)] if pairs else [])])


def of_trial(records: Sequence[Record], name: str) -> list[Record]:
    """A trial's records, by seed."""
    return sorted((r for r in records if r["trial"] == name), key=lambda r: r["seed"])


def _line(own: Sequence[Record], key: str) -> list[str]:
    told = [record["measures"][key] for record in own]
    teacher = [one["teacher"] for one in told if "teacher" in one]
    after, hard = ([one[who] for one in told] for who in ("after", "hard"))
    apart = [one - other for one, other in zip(after, hard, strict=True)]
    return [
        level(estimate(teacher[:1])) if teacher else "",
        level(estimate(hard)),
        level(estimate(after)),
        difference(estimate(apart)),
    ]


def _compared(table: Table, records: Sequence[Record]) -> Iterator[list[str]]:
    titles = {trial.name: trial.title for trial in table.trials}
    for one, other in table.against:
        pair = [{r["seed"]: r for r in of_trial(records, name)} for name in (one, other)]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        if not seeds:
            continue
        cells = []
        for key in table.measures.values():
            values = [[own[s]["measures"][key]["after"] for s in seeds] for own in pair]
            cells.append(difference(estimate([a - b for a, b in zip(*values, strict=True)])))
        yield [f"{titles[one]} \u2212 {titles[other]}", *cells]


def with_tables(document: str, records: Sequence[Record]) -> str:
    """The document with other tables between its marks."""
    for table in TABLES:
        begin, end = f"<!-- {table.mark}: begin -->\n", f"<!-- {table.mark}: end -->"
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = before + begin + text_of(table, records) + end + after
    return document


def published() -> list[Record]:
    """The records in the project."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else []


def publish(folder: Path) -> None:
    """Write a folder's records into the project, in place of those of the same trials and seeds."""
    found = [json.loads(path.read_text()) for path in (folder / "outcomes").glob("*.json")]
    known = {(record["trial"], record["seed"]): record for record in (*published(), *found)}
    records = [known[key] for key in sorted(known)]
    write_atomically(RECORDS, "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    write_atomically(DOCUMENT, with_tables(DOCUMENT.read_text(), records))
