"""Rows, and an engine without a model that fails as a test asks; needs no torch."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets import canary
from shared.targets.asks.head_location import ShippedHead
from shared.targets.codec.elias_fano import EliasFano
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.description import TeacherDescription

VOCAB = 128


def make_rows(
    lengths: Sequence[Sequence[int]], *, vocab: int = VOCAB, seed: int = 0, first: int = 0
) -> Rows:
    """Random rows; each entry of `lengths` lists the document lengths of a row."""
    rng = np.random.default_rng(seed)
    starts = [np.cumsum([0, *row[:-1]]) for row in lengths]
    masks = [np.concatenate([np.append(np.ones(n - 1), 0) for n in row]) for row in lengths]
    return Rows.build(
        domains=["text"] * len(lengths),
        indices=range(first, first + len(lengths)),
        input_ids=[rng.integers(3, vocab, sum(row)) for row in lengths],
        doc_starts=starts,
        loss_masks=masks,
    )


@dataclass(frozen=True)
class Scripted:
    """An engine without a model, with the weaknesses a test asks for; makes itself."""

    delay_s: float = 0.0
    killed_by: int | None = None  # a token id
    killed_once: str | None = None  # a file that remembers that it has happened
    refuses: int | None = None
    fails_on: int | None = None
    hangs_once: str | None = None
    fails_first: str | None = None  # a file that names the one replica that answers nothing

    def __call__(self) -> "Scripted":
        return self

    def describe(self) -> TeacherDescription:
        return TeacherDescription({"model": "scripted"}, VOCAB, 1, 4, (4, 4), None, packed=True)

    def score(self, rows: Rows, spec: Question) -> SoftTargets:
        if rows.domains() != [canary.NAME]:
            self._suffer(rows.column("input_ids"))
        return invented(rows, spec)

    def ship_head(self) -> ShippedHead:
        raise ConfigError("a scripted teacher has no head; use a model")

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        self._suffer(openings.ids())
        return echoed(openings, spec)

    def _suffer(self, asked: Sequence[np.ndarray]) -> None:
        time.sleep(self.delay_s)
        ids = np.concatenate([np.zeros(0, np.int32), *asked])
        if self.killed_by in ids or (self.killed_once and first_time(self.killed_once)):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hangs_once and first_time(self.hangs_once):
            time.sleep(3600)
        if self.refuses in ids:
            raise ConfigError(f"token {self.refuses} is refused; use another")
        if self.fails_on in ids or (self.fails_first and is_first(self.fails_first)):
            raise MemoryError("out of everything")


def first_time(path: str) -> bool:
    """True for the first process that asks."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def is_first(path: str) -> bool:
    """True for the process that was the first to ask, again and again."""
    if first_time(path):
        Path(path).write_text(str(os.getpid()))
    return Path(path).read_text() == str(os.getpid())


class Threaded(Scripted):
    """Says with how many threads its process was told to compute."""

    def describe(self) -> TeacherDescription:
        named = {"model": "scripted", "threads": os.environ["OMP_NUM_THREADS"]}
        return replace(super().describe(), fingerprint=named)


def invented(rows: Rows, spec: Question) -> SoftTargets:
    """An answer that is a function of the rows alone."""
    num = rows.num_loss_tokens()
    seed = int.from_bytes(b"".join(rows.hashes())[:8], "little")
    rng = np.random.default_rng(seed)
    total = int(num.sum())
    ids_NK = np.sort(rng.integers(0, spec.ask.shared_vocab, (total, spec.ask.num_ids)))
    return SoftTargets.build(
        question=spec,
        teacher={"model": "scripted"},
        row_hashes=rows.hashes(),
        num_targets_R=num,
        columns={
            "top_ids": EliasFano(spec.ask.num_ids, spec.ask.shared_vocab).encode(ids_NK),
            "top_logprobs": -rng.random((total, spec.ask.num_ids)).astype(np.float16),
            "log_tail": -rng.random((total, len(spec.ask.temperatures)), np.float32),
            "label_logprob": -rng.random(total, np.float32),
        },
    )


def echoed(openings: Openings, spec: GenerationSpec) -> Continuations:
    """Continuations that repeat their openings."""
    return Continuations.build(
        openings,
        spec,
        teacher={"model": "scripted"},
        output_ids=[ids[: spec.max_new_tokens] for ids in openings.ids()],
        stopped=[len(ids) < spec.max_new_tokens for ids in openings.ids()],
    )
