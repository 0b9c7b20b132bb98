"""What became of each domain's text: two lines before a run starts, kept for its report."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from shared.config.run import Config
from shared.data.account import Account, listed
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import Facts, SplitFacts, facts_of
from shared.in_words import NAME_WIDTH, shortened, those
from shared.run.run_dir import RunDir, damaged, read_written, write_atomically
from shared.text.files import left_out, source_files
from shared.text.formats import is_text
from shared.text.sources import sources_of

COLUMNS = ("documents", "rows", "tokens", "with_loss", "dropped", "cut", "split", "duplicate")
PROSE = frozenset((".txt", ".md", ".markdown", ".rst"))
MARKUP = frozenset(
    (
        *(".yaml", ".yml", ".xml", ".html", ".htm", ".xhtml", ".sql", ".toml", ".ini", ".cfg"),
        *(".conf", ".css", ".svg", ".log", ".properties", ".tex", ".bib"),
    )
)
SPLITS = ("split", "split_with_prompt")
HELD_OUT_WORDS = {"test", "tests", "valid", "validation", "val", "dev", "eval"}
NOT_LEARNT = (
    "document is not learnt, as it says itself",
    "documents are not learnt, as they say themselves",
)
GO_ON = ("document goes on without its prompt", "documents go on without their prompts")
EMPTY = ("answer is empty: it teaches", "answers are empty: they teach")
UNFINISHED = (
    "answer goes on, as it says itself, and its end is not learnt",
    "answers go on, as they say themselves, and their ends are not learnt",
)
REPEATS = {
    True: "it leaves less than a quarter of data.context",
    False: "data.too_long=split_with_prompt repeats it",
}
SPECIAL = ("special token written in the text is", "special tokens written in the text are")


class SplitText(TypedDict):
    """The training text of a domain, or its validation text."""

    documents: int
    rows: int
    tokens: int  # in the rows
    with_loss: int  # tokens
    dropped: int  # documents without a token to learn
    cut: int  # documents that lost their end
    split: int  # documents in several pieces
    duplicate: int  # documents that came before; they are used again
    notes: list[str]  # sentences on whatever else was done


class TextSummary(SplitText):
    """One domain's training text, and its validation text beside it."""

    held_out: bool  # the validation text is a part of the training text
    validation: SplitText


def text_of(
    config: Config,
    domains: tuple[PreparedDomain, ...],
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, TextSummary]:
    """By domain, from what was counted when its text was tokenised; `notes` are further sentences
    on it."""
    found = {domain.name: facts_of(domain.train_path) for domain in domains}
    summaries = {name: _summary(name, facts, config) for name, facts in found.items()}
    for name, said in (notes or {}).items():
        summaries[name]["notes"] += said
    return summaries


def text_lines(found: Mapping[str, TextSummary]) -> list[str]:
    """Two lines per domain under a header, its training text and its validation text, then what
    else is to be said of each."""
    table, told = [["domain", *(name.replace("_", " ") for name in COLUMNS)]], []
    for name, text in found.items():
        validation = text["validation"]
        label = "  held out" if text["held_out"] else "  validation"
        table += [_cells(shortened(name, NAME_WIDTH), text), _cells(label, validation)]
        told += [f"{name}: {note}" for note in text["notes"]]
        told += [f"{name}, validation: {note}" for note in validation["notes"]]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [
        name.ljust(first)
        + "".join(cell.rjust(width + 2) for cell, width in zip(cells, widths, strict=True))
        for name, *cells in table
    ]
    return lines + told


def _cells(name: str, text: SplitText) -> list[str]:
    return [name, *(f"{text[column]:,}" for column in COLUMNS)]


def write_text(run_dir: RunDir, found: Mapping[str, TextSummary]) -> None:
    """Keep the account in the run folder, for the summary and the report."""
    write_atomically(run_dir.text, json.dumps(found, indent=1) + "\n")


def read_text(run_dir: RunDir) -> dict[str, TextSummary]:
    """What `write_text` kept; empty where it kept nothing. Raises DamagedError."""
    found = read_written(run_dir.text)
    for name, told in found.items():
        parts = (told, told.get("validation", told)) if isinstance(told, dict) else (None,)
        if not all(map(_is_split, parts)):
            raise damaged(run_dir.text, f"{name} has no counts and notes of a text")
    return found


def _is_split(told: object) -> bool:
    """Whether a value is what is written of a domain's training or validation text."""
    if not isinstance(told, dict) or not isinstance(notes := told.get("notes", []), list):
        return False
    are_counts = all(type(told.get(column)) is int for column in COLUMNS)
    return are_counts and all(isinstance(note, str) for note in notes)


def _summary(name: str, facts: Facts, config: Config) -> TextSummary:
    training = _split_text(facts.training, config, [*_kept_apart(facts), *_left_out(name, config)])
    held_out = config.domains[name].validation is None
    notes = [] if held_out else [*_left_out(name, config, "validation"), *_unused_rows(facts)]
    validation = _split_text(facts.validation, config, notes)
    return TextSummary(**training, held_out=held_out, validation=validation)


def _split_text(facts: SplitFacts, config: Config, notes: list[str]) -> SplitText:
    """The counts of a split; `notes` is what they do not tell."""
    fit, too_long = facts.account.fit, config.data.too_long
    return SplitText(
        documents=fit.documents,
        rows=facts.num_rows,
        tokens=facts.num_tokens,
        with_loss=facts.num_loss_tokens,
        dropped=fit.without_loss,
        cut=fit.too_long if too_long == "cut" else 0,
        split=fit.too_long if too_long in SPLITS else 0,
        duplicate=fit.duplicates,
        notes=[*_notes(facts.account, config), *notes],
    )


def _kept_apart(facts: Facts) -> list[str]:
    count = facts.also_in_validation
    if not count:
        return []
    dropped = those(count, "piece is dropped", "pieces are dropped")
    return [f"{dropped}, since the validation text has it too"]


def _unused_rows(facts: Facts) -> list[str]:
    kept, found = facts.validation.num_rows, facts.validation_rows_found
    return [f"{kept:,} of {found:,} rows are used (data.validation_rows)"] if kept < found else []


def _left_out(
    name: str, config: Config, split: Literal["train", "validation"] = "train"
) -> list[str]:
    """Files of a split's folders and globs that are not read, and that may not be meant to be."""
    sources, root = sources_of(config.domains[name], split), Path(config.paths.root)
    names = [source for source in sources if isinstance(source, str)]
    out = [file for name in names for file in left_out(name, root=root)]
    texts = [file for name in names for file in _texts_beside_rows(name, root)]
    markup = [file for name in names for file in _markup_beside_prose(name, root)]
    told = (
        (out, "are not read"),
        (texts, "are one text each, beside rows"),
        (markup, "are learnt as one text each, beside prose (a glob as *.txt leaves them out)"),
        *_doubtful([file for name in names for file in source_files(name, root=root)], split),
    )
    return [f"files that {what}: {_named(files)}" for files, what in told if files]


def _doubtful(
    files: list[Path], split: Literal["train", "validation"]
) -> list[tuple[list[Path], str]]:
    """Files that hold nothing, and training text that its names call something else."""
    empty = [file for file in files if not file.stat().st_size]
    words = {file: frozenset(re.split(r"[\W_]+", file.name.lower())) for file in files}
    held_out = [file for file in files if words[file] & HELD_OUT_WORDS]
    if split == "validation" or not any("train" in words[file] for file in files):
        held_out = []
    return [(empty, "are empty"), (held_out, "are trained on, whatever their names say")]


def _markup_beside_prose(source: str, root: Path) -> list[Path]:
    """Files of settings, queries and pages in a folder or glob that has prose too, and no rows."""
    files = source_files(source, root=root)
    kinds = {file.suffix.lower() for file in files}
    if not kinds & PROSE or not all(map(is_text, files)):
        return []
    return [file for file in files if file.suffix.lower() in MARKUP]


def _texts_beside_rows(source: str, root: Path) -> list[Path]:
    files = source_files(source, root=root)
    texts = [file for file in files if is_text(file)]
    return texts if len(texts) < len(files) else []


def _notes(account: Account, config: Config) -> list[str]:
    told = (*_on_documents(account, config), *_on_tokens(account))
    return [note for count, note in told if count]


def _on_documents(account: Account, config: Config) -> tuple[tuple[object, str], ...]:
    """What becomes of whole documents: how much of it there is, and the sentence on it."""
    tally, fit, too_long = account.tally, account.fit, config.data.too_long
    dropped = listed(tally.roles_without_loss)
    return (
        (len(tally.kinds) > 1, f"kinds of rows: {listed(tally.kinds)}"),
        (fit.without_loss and dropped, f"roles of the dropped documents: {dropped}"),
        (
            tally.unknown_roles,
            "roles that are not known, whose messages are not learnt: "
            f"{listed(tally.unknown_roles)}",
        ),
        (
            tally.not_learnt,
            those(tally.not_learnt, *NOT_LEARNT) + " (weight: 0, train: false or the like)",
        ),
        (
            fit.too_long and too_long == "cut",
            those(fit.too_long, "document loses its end", "documents lose their ends")
            + ", cut off and not learnt; data.too_long=split learns it",
        ),
        (
            fit.too_long and too_long == "drop",
            those(fit.too_long, "document is", "documents are")
            + " dropped, longer than data.context (data.too_long)",
        ),
        (
            tally.unfit,
            "rows that are dropped, since their teacher_prompt cannot be shown with them "
            f"(data.unfit): {listed(tally.unfit)}",
        ),
        (
            fit.beyond_context,
            those(fit.beyond_context, "document is", "documents are")
            + " dropped, since what is learnt of it begins beyond data.context",
        ),
        (
            fit.without_prompt,
            those(fit.without_prompt, *GO_ON)
            + " in a later piece; "
            + REPEATS[too_long == "split_with_prompt"],
        ),
    )


def _on_tokens(account: Account) -> tuple[tuple[object, str], ...]:
    """The same of special tokens, the chat template and fields."""
    tally = account.tally
    return (
        (
            tally.special_as_text,
            those(tally.special_as_text, *SPECIAL) + " plain text (data.special_tokens)",
        ),
        (
            tally.special_as_control,
            those(tally.special_as_control, *SPECIAL) + " control tokens (data.special_tokens)",
        ),
        (
            tally.changed_messages,
            those(tally.changed_messages, "message is", "messages are")
            + " left out or changed by the chat template",
        ),
        (
            tally.other_openings,
            those(tally.other_openings, "answer does", "answers do")
            + " not begin as the chat template's generation prompt says",
        ),
        (
            tally.empty_answers,
            those(tally.empty_answers, *EMPTY) + " to end where an answer begins",
        ),
        (
            tally.unfinished,
            those(tally.unfinished, *UNFINISHED) + " (prefix: true or the like)",
        ),
        (tally.unread, f"fields that are not read: {listed(tally.unread)}"),
    )


def _named(files: list[Path], most: int = 6) -> str:
    names = list(dict.fromkeys(file.name for file in files))
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
