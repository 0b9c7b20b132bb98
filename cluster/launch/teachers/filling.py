"""Masks of training text filled by the teacher before training starts (after Learning to Augment,
arXiv 2101.08106, whose generator is a masked language model).

The paper's equations are not public to us; this is a reconstruction for causal teachers. A masked
token gets one of the ids that the teacher finds likeliest after the text to its left, which it
reads as it was, other masked tokens among it: so one reading of a copy fills all its masks, with
any engine. A token is masked whole, whatever part of a word it is. With `augmentation.across` a
document comes after one of another domain's training text, so that what the teacher proposes leans
towards that: this is our reading of the paper's manipulation of source and target text. Validation
text is neither filled nor read.

What was drawn is kept in the cache under a name that is a hash of all that decides it, and no later
run asks again.

R rows of a domain in file order   D documents of a unit   M masks of a document   N masks of a unit
"""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from cluster.planning.difficulty import ScoringModel
from cluster.planning.preparation import Prepared
from shared.config.text.augmentation import Augmentation
from shared.data.augmented.fills import Fills, Masked, drawn, generator_of, write
from shared.data.prepared import PreparedDomain
from shared.data.row_cache import storage_errors
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import DataError
from shared.locking import alone
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import Question
from shared.targets.reader import TargetReader, answered
from shared.targets.soft_targets import SoftTargets
from shared.text.digests import digest_file

FORMAT = 1  # counts up when masks are drawn or filled in another way
MOST_SPECIAL = 64  # special ids beside which a token's candidates are asked for
MOST_BEFORE = 64  # tokens of another domain's text that the teacher reads before a document


def filled_domains(
    prepared: Prepared, domains: Sequence[PreparedDomain], *, teachers: Mapping[str, ScoringModel]
) -> tuple[PreparedDomain, ...]:
    """The domains with the fills of their training rows, by the teacher of each, of several the one
    of the largest weight; says what it filled.

    Raises DataError where no token of any can be masked, StorageError where the cache is full.
    """
    folder = Path(prepared.config.paths.cache).expanduser() / "fills"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found, num_fills = [], 0
    for domain in domains:
        teacher = teachers[prepared.config.teacher_of(domain.name)]
        path, fills = _Filling.of(prepared, domain, teacher).kept(folder)
        num_fills += fills.num_fills
        found.append(replace(domain, fills_path=str(path)))
    if not num_fills:
        raise DataError(
            f"augmentation.mask is {prepared.config.augmentation.mask:g}, but nothing was masked: "
            "no document has enough tokens between its first and its last that are no special "
            "ones; raise mask, or leave augmentation out"
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Filling:
    """One domain, who fills it, and what is read before its documents."""

    prepared: Prepared
    domain: PreparedDomain
    teacher: ScoringModel
    store: RowStore
    others: tuple[RowStore, ...]  # of the domains whose text is read first, if any is

    @staticmethod
    def of(prepared: Prepared, domain: PreparedDomain, teacher: ScoringModel) -> "_Filling":
        """Map the training rows that it reads."""
        others = [one for one in prepared.domains if one.name != domain.name]
        across = others if prepared.config.augmentation.across else []
        store, *read = (RowStore.open(one.train_path) for one in (domain, *across))
        return _Filling(prepared, domain, teacher, store, tuple(read))

    @property
    def section(self) -> Augmentation:
        """Of the config."""
        return self.prepared.config.augmentation

    def kept(self, folder: Path) -> tuple[Path, Fills]:
        """The domain's fills in the cache, asked for where they are not there; safe with several
        processes at once."""
        path = folder / f"{self._key()}.arrow"
        with alone(path.with_suffix(".lock"), making=f"the fills of {self.domain.name}"):
            try:
                return path, Fills.open(path)
            except DataError:  # absent or damaged
                self._fill(path)
        return path, Fills.open(path)

    def _key(self) -> str:
        """Names all that decides a fill, but not the size of a unit: it moves what a teacher says
        by the rounding of one forward pass only."""
        decides = {
            "format": FORMAT,
            "seed": self.prepared.config.seed,
            "rows": [digest_file(Path(store.path)) for store in (self.store, *self.others)],
            "teacher": dict(self.teacher.identity),
            "question": self._question.as_dict(),
            "section": self.section.model_dump(include={"mask", "candidates", "copies", "across"}),
            "special_ids": sorted(self.prepared.special_ids),
            "room": self._room,
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())

    def _fill(self, path: Path) -> None:
        """Ask about every copy of every row, under a bar, and keep what is drawn."""
        size, copies = len(self.store), self.section.copies
        name, hidden = f"filling {self.domain.name}", not sys.stderr.isatty()
        found, num_read = list[tuple[np.ndarray, np.ndarray]](), 0
        print(f"the teacher fills masks of {size:,} rows of {self.domain.name}", flush=True)
        assert self.teacher.serve is not None, "a teacher is alive"
        with (
            self.teacher.serve() as open_reader,
            tqdm(total=copies * size, desc=name, unit="row", disable=hidden) as bar,
        ):
            reader = open_reader(0)
            try:
                for unit, answers in self._answered(reader):
                    found += unit.filled(answers, self.section, self.prepared.special_ids)
                    num_read += unit.num_tokens + len(unit.documents) * self._shown
                    bar.update(len(unit.rows))
            finally:
                reader.close()
        by_row = [found[copy * size + row] for row in range(size) for copy in range(copies)]
        places, ids = zip(*by_row, strict=True)
        with storage_errors(path.parent):
            write(path, copies=copies, places=places, ids=ids)
        print(
            f"the teacher filled {sum(map(len, ids)):,} masks of {size:,} rows of "
            f"{self.domain.name}, for which it read {num_read:,} tokens",
            flush=True,
        )

    def _answered(self, reader: TargetReader) -> Iterator[tuple["_Unit", Sequence[SoftTargets]]]:
        """Every copy of all rows, and what the teacher says of those that have masks. They are
        drawn twice, when they are asked about and when they are answered, and are the same."""
        size = self.prepared.config.batch.micro_batch
        asked = (rows for unit in self._units() for rows in unit.asked(room=self._room, size=size))
        ahead = 2 * self.prepared.config.service.in_flight
        answers = answered(reader, asked, self._question, ahead=ahead)
        for unit in self._units():
            parts = unit.asked(room=self._room, size=size)
            yield unit, [next(answers)[1] for _ in parts]

    def _units(self) -> Iterator["_Unit"]:
        for copy in range(self.section.copies):
            for rows in self.store.units(self.prepared.config.batch.micro_batch):
                yield _Unit(rows, tuple(self._documents(rows, copy)))

    def _documents(self, rows: Rows, copy: int) -> Iterator["_Document"]:
        """Every document of rows with masks."""
        columns = (rows.column(name) for name in ("input_ids", "doc_starts"))
        for row, (name, ids, starts) in enumerate(zip(rows.names(), *columns, strict=True)):
            for number, (first, part) in enumerate(
                zip(starts, np.split(ids, starts[1:]), strict=True)
            ):
                random = generator_of(self.prepared.config.seed, name, number, copy)
                special = self.prepared.special_ids
                drawing = {"share": self.section.mask, "special_ids": special, "first": self._first}
                masked = Masked.of(part, random, **drawing)
                if len(masked.place_M):
                    yield _Document(row, int(first), masked, self._before(len(part), random))

    def _before(self, length: int, random: np.random.Generator) -> np.ndarray:
        """What is read before a document: the first tokens of a row of another domain, as many as
        there is room for."""
        room = min(MOST_BEFORE, self._room - length)
        if not self.others or room < 1:
            return np.zeros(0, np.int32)
        store = self.others[int(random.integers(len(self.others)))]
        (taken,) = store.take([int(random.integers(len(store)))]).column("input_ids")
        return taken[:room]

    @property
    def _question(self) -> Question:
        vocab = min(facts.shared_vocab for facts in self.prepared.teachers.values())
        # Beside a token's own id, which is not drawn, as many as may be special ones.
        most_special = min(len(self.prepared.special_ids), MOST_SPECIAL)
        num_ids = min(self.section.candidates + 1 + most_special, vocab)
        ask = LikeliestIds(num_ids, vocab, encoding="fp32")
        return Question(ask, prefix=self.prepared.showing.prompts)

    @property
    def _first(self) -> int:
        """The first place that may be masked: none of those that a prompt stands before."""
        shown = self.prepared.showing.of_domains.get(self.domain.name)
        return len(shown.plain_ids) if shown is not None else 0

    @property
    def _room(self) -> int:
        """Tokens of the longest line that the teacher is sent, without the run's prompt."""
        config, name = self.prepared.config, self.domain.name
        limit = self.prepared.teachers[config.teacher_of(name)].context
        context = config.data.context
        return context if limit is None else min(context, limit - self._shown)

    @property
    def _shown(self) -> int:
        """Tokens by which the run's prompt makes a document longer at most."""
        shown = self.prepared.showing.openings.get(self.domain.name)
        return shown.longest if shown is not None else 0


@dataclass(frozen=True, slots=True)
class _Document:
    """A document with masks."""

    row: int  # of its unit
    first: int  # its first place in the row
    masked: Masked
    before: np.ndarray  # int32; what the teacher reads first

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return len(self.before) + len(self.masked.ids_T)

    @property
    def input_ids(self) -> np.ndarray:
        """Those tokens."""
        return np.concatenate([self.before, self.masked.ids_T])

    @property
    def loss_mask(self) -> np.ndarray:
        """1 where the next of them is masked."""
        mask = np.zeros(self.num_tokens, np.uint8)
        mask[len(self.before) + self.masked.place_M - 1] = 1
        return mask


@dataclass(frozen=True, slots=True)
class _Unit:
    """A copy of some rows."""

    rows: Rows
    documents: tuple[_Document, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return sum(one.num_tokens for one in self.documents)

    def asked(self, *, room: int, size: int) -> list[Rows]:
        """What the teacher is asked, `size` lines at a time: the documents in order, as many to a
        line as fit into `room` beside each other, with loss where the next token is masked."""
        lines, taken = list[list[_Document]](), room
        for one in self.documents:
            if taken + one.num_tokens > room:
                lines.append([])
                taken = 0
            lines[-1].append(one)
            taken += one.num_tokens
        return [self._rows(lines[at : at + size]) for at in range(0, len(lines), size)]

    def _rows(self, lines: Sequence[Sequence[_Document]]) -> Rows:
        domains, indices = self.rows.domains(), self.rows.table.column("index").to_pylist()
        lengths = [[one.num_tokens for one in line] for line in lines]
        return Rows.build(
            domains=[domains[line[0].row] for line in lines],
            indices=[indices[line[0].row] for line in lines],
            input_ids=[np.concatenate([one.input_ids for one in line]) for line in lines],
            doc_starts=[np.cumsum([0, *each[:-1]]) for each in lengths],
            loss_masks=[np.concatenate([one.loss_mask for one in line]) for line in lines],
        )

    def filled(
        self, answers: Sequence[SoftTargets], section: Augmentation, special_ids: Collection[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places and ids of the fills of each row; `answers` are to what was asked."""
        places = [[np.zeros(0, np.int32)] for _ in range(len(self.rows))]
        ids = [[np.zeros(0, np.int32)] for _ in range(len(self.rows))]
        if answers:
            kept = [answer.arrays().kept for answer in answers]
            masked = [one.masked for one in self.documents]
            fill_N = drawn(
                np.concatenate([one["ids_NK"] for one in kept]),
                np.concatenate([one["logprobs_NK"] for one in kept]),
                own_M=np.concatenate([one.ids_T[one.place_M] for one in masked]),
                chance_M=np.concatenate([one.chance_M for one in masked]),
                most=section.candidates,
                special_ids=special_ids,
            )
            ends = np.cumsum([len(one.place_M) for one in masked])[:-1]
            for one, fill_M in zip(self.documents, np.split(fill_N, ends), strict=True):
                is_filled_M = fill_M >= 0
                places[one.row].append(one.first + one.masked.place_M[is_filled_M])
                ids[one.row].append(fill_M[is_filled_M])
        for at, fills in zip(places, ids, strict=True):
            yield np.concatenate(at).astype(np.int32), np.concatenate(fills).astype(np.int32)
