"""Canary: a fixed text by which an engine shows that it still answers, and still is what it was.

An engine whose weights were not loaded, were overwritten or are multiplied by a broken kernel
answers on, with numbers of the right shape; those of a text that is known tell it from a sound one.

N positions with loss, or classes of a classifier
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shared.data.rows import Rows
from shared.errors import EngineError
from shared.targets.asks.classes import HeadLogProbs
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets

NAME = "canary"  # the domain of its row
TOKENS = 16
STRIDES = (7919, 7907)  # between its ids, primes: the first that is no part of a vocabulary
INTERVAL = 64  # units between two looks
FLAT = 1e-4  # nats between the largest and the smallest, below which all are one
LEVELS = {"float32": 1e-3}  # nats that an answer may differ from the first
COARSE_LEVEL = 5e-2  # the same with fewer bits

Score = Callable[[Rows, Question], SoftTargets]


def canary_rows(vocab: int, limit: int | None = None) -> Rows:
    """The text as a row of a model with `vocab` ids, which reads at most `limit` tokens."""
    return whole_text(_text(vocab, limit))


def whole_text(ids: np.ndarray) -> Rows:
    """A text as a row in which every token but the first is asked about."""
    return _row(ids, np.append(np.ones(len(ids) - 1), 0))


def canary_text(vocab: int, limit: int | None = None) -> Rows:
    """The same for a classifier: the text, and the first class in the place of a next token."""
    ids = _text(vocab, limit)
    return _row(np.append(ids, 0), np.append(np.zeros(len(ids) - 1), [1, 0]))


def _text(vocab: int, limit: int | None) -> np.ndarray:
    stride = next(each for each in STRIDES if vocab % each)
    return np.arange(min(TOKENS, limit or TOKENS)) * stride % vocab


def _row(ids: np.ndarray, mask: np.ndarray) -> Rows:
    return Rows.build(
        domains=[NAME],
        indices=[0],
        input_ids=[ids],
        doc_starts=[np.zeros(1)],
        loss_masks=[mask],
    )


def refuse_not_finite(logprob_N: np.ndarray, *, engine: str) -> None:
    """Raise EngineError where log-probabilities of a text are no numbers."""
    if not np.isfinite(logprob_N).all():
        raise EngineError(
            f"{engine} gives a fixed text log-probabilities that are not finite; look at its "
            "weights and its dtype"
        )


def is_flat(logprob_N: np.ndarray) -> bool:
    """Whether log-probabilities of a text are one number, as those of a head of zeros."""
    return bool(np.ptp(logprob_N) < FLAT)


def refuse_flat(logprob_N: np.ndarray, *, engine: str, each: str = "token") -> None:
    """Raise EngineError where log-probabilities of a text are one number, or none."""
    refuse_not_finite(logprob_N, engine=engine)
    if is_flat(logprob_N):
        raise EngineError(
            f"{engine} gives every {each} of a fixed text the log-probability {logprob_N[0]:.4f}, "
            "as if it had no weights; nothing is learnt from it: look at its weights, or start it "
            "on other hardware"
        )


def refuse_other(
    logprob_N: np.ndarray, expected_N: np.ndarray, *, engine: str, than: str, level: float
) -> None:
    """Raise EngineError where log-probabilities of a text are off by more than `level` nats from
    those `than` which they should be no other."""
    off = float(np.abs(logprob_N - expected_N).max())
    if not off <= level:  # nor where it is none
        raise EngineError(
            f"{engine} gives a fixed text log-probabilities that are {off:.2g} nats off {than}, "
            f"where {level:g} are allowed; nothing is learnt from it: start it again"
        )


@dataclass(slots=True)
class Canary:
    """Watches one engine, which is asked through `score`; `dtype` is that of its weights."""

    score: Score
    engine: str  # for messages
    vocab: int
    limit: int | None = None
    dtype: str = "float32"
    interval: int = INTERVAL
    classes: tuple[str, ...] = ()  # of a classifier, which is asked about these
    _first_N: np.ndarray | None = field(default=None)
    _units: int = field(default=0)  # since the last look

    def begin(self, expected_N: np.ndarray | None = None, *, level: float = LEVELS["float32"]):
        """Look at an engine that has loaded weights. Those that a trainer has handed over must give
        the log-probabilities that it finds itself, `expected_N`. Raises EngineError."""
        self._units, found_N = 0, self._asked()
        each = "class" if self.classes else "token"
        refuse_flat(found_N, engine=self.engine, each=each)
        if expected_N is not None:
            than = "those of the trainer that its weights come from"
            refuse_other(found_N, expected_N, engine=self.engine, than=than, level=level)
        self._first_N = found_N

    def count(self) -> None:
        """Look again before every `interval`-th unit, and before every one after a look that was
        refused. Raises EngineError for an engine that answers otherwise than at first."""
        self._units += 1
        if self._first_N is None or self._units < self.interval:
            return
        level, than = LEVELS.get(self.dtype, COARSE_LEVEL), "its own first answer"
        refuse_other(self._asked(), self._first_N, engine=self.engine, than=than, level=level)
        self._units = 0

    def _asked(self) -> np.ndarray:
        """The log-probability of each token that follows, or of each class, float32 [N]."""
        if self.classes:
            asked = HeadLogProbs(self.classes)
            answer = self.score(canary_text(self.vocab, self.limit), Question(asked))
            return np.array(answer.arrays().kept[asked.array][0])
        question = Question(LikeliestIds(1, self.vocab))
        answer = self.score(canary_rows(self.vocab, self.limit), question)
        return np.array(answer.arrays().label_logprob_N)
