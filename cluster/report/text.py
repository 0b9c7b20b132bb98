"""What became of each domain's text: a line per domain before a run starts, kept for its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from shared.config.run import Config
from shared.data.account import listed
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import Facts, facts_of
from shared.run.run_dir import RunDir, write_atomically
from shared.text.files import left_out
from shared.text.sources import sources_of

COLUMNS = ("documents", "rows", "tokens", "with_loss", "dropped", "cut", "split", "duplicate")
NAME_WIDTH = 18  # of a domain or a teacher in a table


class TextSummary(TypedDict):
    """One domain's training text."""

    documents: int
    rows: int
    tokens: int  # in the rows
    with_loss: int  # tokens
    dropped: int  # documents without a token to learn
    cut: int  # documents that lost their end
    split: int  # documents in several pieces
    duplicate: int  # documents that came before; they are learnt again
    notes: list[str]  # sentences on whatever else was done


def text_of(config: Config, domains: tuple[PreparedDomain, ...]) -> dict[str, TextSummary]:
    """By domain, from what was counted when its text was tokenised."""
    found = {domain.name: facts_of(domain.train_path) for domain in domains}
    return {name: _summary(name, facts, config) for name, facts in found.items()}


def text_lines(found: Mapping[str, TextSummary]) -> list[str]:
    """A line per domain under a header, then what else is to be said of each."""
    table = [["domain", *(name.replace("_", " ") for name in COLUMNS)]]
    for name, text in found.items():
        counts = (f"{text[column]:,}" for column in COLUMNS)
        table.append([shortened(name, NAME_WIDTH), *counts])
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [
        name.ljust(first)
        + "".join(cell.rjust(width + 2) for cell, width in zip(cells, widths, strict=True))
        for name, *cells in table
    ]
    return lines + [f"{name}: {note}" for name, text in found.items() for note in text["notes"]]


def shortened(name: str, width: int) -> str:
    """A name for a column of a table."""
    return name if len(name) <= width else name[: width - 2] + ".."


def write_text(run_dir: RunDir, found: Mapping[str, TextSummary]) -> None:
    """Keep the account in the run folder, for the summary and the report."""
    write_atomically(run_dir.text, json.dumps(found, indent=1) + "\n")


def _summary(name: str, facts: Facts, config: Config) -> TextSummary:
    is_cut = config.data.too_long == "cut"
    return TextSummary(
        documents=facts.documents,
        rows=facts.num_rows,
        tokens=facts.num_tokens,
        with_loss=facts.num_loss_tokens,
        dropped=facts.without_loss,
        cut=facts.too_long if is_cut else 0,
        split=0 if is_cut else facts.too_long,
        duplicate=facts.duplicates,
        notes=_notes(facts, config, _left_out_of(name, config)),
    )


def _left_out_of(name: str, config: Config) -> list[Path]:
    """Files of a domain's folders and globs that are not read."""
    domain, root = config.domains[name], Path(config.paths.root)
    sources = (*sources_of(domain, "train"), *sources_of(domain, "validation"))
    files = (f for s in sources if isinstance(s, str) for f in left_out(s, root=root))
    return list(dict.fromkeys(files))


def _notes(facts: Facts, config: Config, files: list[Path]) -> list[str]:
    tally, too_long = facts.tally, config.data.too_long
    dropped = listed(tally["roles_without_loss"])
    special = "special tokens written in the text are"
    told = (
        (facts.without_loss and dropped, f"roles of the dropped documents: {dropped}"),
        (
            facts.also_in_validation,
            f"{facts.also_in_validation:,} pieces are dropped, since the validation text has them",
        ),
        (
            facts.too_long and too_long == "cut",
            f"the ends of {facts.too_long:,} documents are cut off and not learnt; "
            "data.too_long=split learns them",
        ),
        (
            facts.without_prompt,
            f"{facts.without_prompt:,} documents go on without their prompt in a later piece; "
            "data.too_long=split_with_prompt repeats it",
        ),
        (
            tally["special_as_text"],
            f"{tally['special_as_text']:,} {special} plain text (data.special_tokens)",
        ),
        (
            tally["special_as_control"],
            f"{tally['special_as_control']:,} {special} control tokens (data.special_tokens)",
        ),
        (
            tally["changed_messages"],
            f"{tally['changed_messages']:,} messages are left out or changed by the chat template",
        ),
        (
            tally["other_openings"],
            f"{tally['other_openings']:,} answers do not begin as the chat template's generation "
            "prompt says",
        ),
        (tally["unread"], f"fields that are not read: {listed(tally['unread'])}"),
        (files, f"files that are not read: {_named(files)}"),
    )
    return [note for count, note in told if count]


def _named(files: list[Path], most: int = 6) -> str:
    names = list(dict.fromkeys(file.name for file in files))
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
