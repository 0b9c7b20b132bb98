"""The teacher's rows of a run across tokenizers: made once, and kept in the cache."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from cluster.planning.across.tokenizers import Tokenizers
from shared.across.token_pair import TokenPair
from shared.across.translating import Translator
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import makers, storage_errors
from shared.data.row_store import RowStore, write_rows
from shared.errors import DataError, HandshakeError
from shared.locking import alone
from shared.run.run_dir import write_atomically
from shared.text.digests import digest_file
from shared.text.sources import Split

FOLDER = "teacher_rows"
FORMAT = 2  # counts up when rows are made in another way
SAFE = 0.85  # of a context that would fit, were text of a shorter one as long in tokens
LARGE_SHARE = 0.01  # of documents that are not compared, which is told


@dataclass(frozen=True, slots=True)
class ReadAcross:
    """What a run across tokenizers has beside its domains."""

    pair: TokenPair
    longest: int  # tokens of the teacher's longest row
    notes: tuple[str, ...]


def read_across(
    domains: Sequence[PreparedDomain],
    tokenizers: Tokenizers,
    *,
    cache: Path,
    context: int,
    teacher_context: int | None,
) -> tuple[tuple[PreparedDomain, ...], ReadAcross]:
    """The domains with the teacher's rows, which lie in the cache or are written there.

    Raises HandshakeError for a row that is longer than the teacher reads, or with a token that a
    model's embedding does not hold, DataError for a domain of which nothing can be compared,
    StorageError where the cache is full.
    """
    found, notes = [], [tokenizers.note()]
    for domain in domains:
        read: dict[Split, tuple[str, float]] = {
            split: _rows(domain, split, tokenizers, cache) for split in domain.paths
        }
        if any(share == 1 for _, share in read.values()):
            raise DataError(
                f"no document of domain {domain.name} is read alike by both tokenizers, so that "
                f"nothing of it can be compared; look at domains.{domain.name}, or leave it out"
            )
        notes += [
            f"{share:.1%} of the documents of {domain.name} ({split}) are not read alike by both "
            "tokenizers, and the teacher says nothing of them"
            for split, (_, share) in read.items()
            if share > LARGE_SHARE
        ]
        own: dict[Split, str] = {split: path for split, (path, _) in read.items()}
        found.append(replace(domain, teacher_paths=own))
        _refuse_unknown(domain, own, tokenizers.rows)
    longest = max(_longest(path) for domain in found for path in domain.read_by_teacher.values())
    if teacher_context is not None and longest > teacher_context:
        fitting = int(SAFE * context * teacher_context / longest)
        raise HandshakeError(
            f"a row of data.context {context} has up to {longest} tokens of the teacher's, which "
            f"reads {teacher_context}; set data.context={fitting} or "
            "lower"
        )
    return tuple(found), ReadAcross(tokenizers.pair, longest, tuple(notes))


def _rows(
    domain: PreparedDomain, split: Split, tokenizers: Tokenizers, cache: Path
) -> tuple[str, float]:
    """The teacher's file of a domain, and the share of documents that it does not read alike."""
    students = domain.paths[split]
    if tokenizers.are_same:
        return students, 0.0
    folder = cache.expanduser().absolute() / FOLDER
    path = folder / f"{_digest(students, tokenizers)}.arrow"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock"), making=f"the teacher's tokens of {domain.name}"):
            share = _kept(path)
            if share is None:
                share = _write(path, domain.name, RowStore.open(students), tokenizers)
    return str(path), share


def _write(path: Path, domain: str, store: RowStore, tokenizers: Tokenizers) -> float:
    """Translate and write; the share of documents that are left out."""
    translator = Translator(
        tokenizers.student, tokenizers.teacher, tokenizers.pair, tokenizers.load_teachers()
    )
    found = translator.translated(store)
    draft, share = path.with_name(f".{path.name}"), found.left_out / max(1, found.documents)
    write_rows(draft, domain=domain, rows=found.rows)
    facts = {"digest": digest_file(draft), "left_out": share}
    draft.replace(path)
    write_atomically(path.with_suffix(".json"), json.dumps(facts))
    return share


def _kept(path: Path) -> float | None:
    """The share of documents left out of a whole file; None where it is absent or damaged."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        return facts["left_out"] if facts["digest"] == digest_file(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(students: str, tokenizers: Tokenizers) -> str:
    """Of all that decides the teacher's rows."""
    decides = {
        "format": FORMAT,
        "rows": digest_file(Path(students)),
        "tokenizers": tokenizers.digests,
        "pair": [
            side.width_V.tolist() for side in (tokenizers.pair.student, tokenizers.pair.teacher)
        ],
        "made_by": makers(),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _refuse_unknown(
    domain: PreparedDomain, own: Mapping[Split, str], rows: Mapping[str, int]
) -> None:
    for name, paths in (("student", domain.paths), ("teacher", own)):
        largest = max(RowStore.open(path).largest_id() for path in paths.values())
        if largest >= rows[name]:
            raise HandshakeError(
                f"domain {domain.name} has token {largest} of the {name}'s tokenizer, whose model "
                f"holds {rows[name]:,}; take a model with a row for each id, or leave such text out"
            )


def _longest(path: str) -> int:
    reader = RowStore.open(path).reader
    batches = map(reader.get_batch, range(reader.num_record_batches))
    lengths = (batch.column("input_ids").value_lengths().to_numpy() for batch in batches)
    return max((int(np.max(found, initial=0)) for found in lengths), default=0)
