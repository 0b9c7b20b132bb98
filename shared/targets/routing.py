"""Several teachers behind one reader: every row is answered by the teacher of its domain, or by
several whose distributions are averaged.

A unit is cut by who answers, its rows in their order; each teacher is asked in a question of its
own, and what they say comes back together, in parts.

N positions with loss of a unit   P those of a part
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.data.rows import Rows
from shared.targets.paired import PairedTargets
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets

Questions = Mapping[Question, Question]  # the run's -> a teacher's own


Shares = Mapping[str, float]  # teacher -> its share of an average; they sum to 1


def among(shares: Shares, teachers: Iterable[str]) -> dict[str, float]:
    """The shares in the order of the run's teachers."""
    return {name: shares[name] for name in teachers if name in shares}


def called(shares: Shares) -> str:
    """What an average is called where a teacher's name stands."""
    if len(shares) == 1:
        return next(iter(shares))
    return " + ".join(f"{share!r} {name}" for name, share in shares.items())


@dataclass(frozen=True, slots=True)
class Part:
    """What one teacher says of its rows of a unit, by itself or as one of an average."""

    teacher: str
    index_P: np.ndarray  # int64, the positions of the unit that it is about, ascending
    targets: SoftTargets
    shares: Shares  # of all whose average is learnt at these positions, in the run's order

    @property
    def is_averaged(self) -> bool:
        """Whether others answer about the same positions."""
        return len(self.shares) > 1


@dataclass(frozen=True, slots=True)
class MixedTargets:
    """The answers of several teachers to one unit; every position is in one part, or in one of
    each teacher whose average is learnt there."""

    parts: tuple[Part, ...]


class RoutingReader:
    """Asks each teacher about the rows of its domains; otherwise as a `TargetReader`.

    `teachers_of` is by domain, `readers` and `questions` are by teacher.
    """

    def __init__(
        self,
        readers: Mapping[str, TargetReader],
        *,
        teachers_of: Mapping[str, Shares],
        questions: Mapping[str, Questions],
    ) -> None:
        self._readers, self._questions = readers, questions
        self._shares_of = {d: among(shares, readers) for d, shares in teachers_of.items()}
        order = {name: place for place, name in enumerate(readers)}
        distinct = {called(shares): shares for shares in self._shares_of.values()}
        self._groups = sorted(
            distinct.values(), key=lambda own: (len(own), [order[name] for name in own])
        )
        self._asked: deque[list[tuple[str, np.ndarray, Shares]]] = deque()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made, of all teachers and of each."""
        each = {name: reader.stats for name, reader in self._readers.items()}
        return ReaderStats.summed(each)

    def submit(self, rows: Rows, question: Question) -> None:
        """Ask for a unit; never blocks."""
        own = [self._shares_of[domain] for domain in rows.domains()]
        num_R = rows.num_loss_tokens()
        asked = []
        for group in self._groups:
            is_own_R = [shares == group for shares in own]
            index_P = np.flatnonzero(np.repeat(is_own_R, num_R))
            for name in group if any(is_own_R) else ():
                self._readers[name].submit(rows.where(is_own_R), self._questions[name][question])
                asked.append((name, index_P, group))
        self._asked.append(asked)

    def next(self) -> MixedTargets:
        """The oldest answer not yet taken, waited for. Raises TeacherError, naming the rows."""
        parts = [
            Part(name, index_P, self._readers[name].next(), shares)
            for name, index_P, shares in self._asked[0]
        ]
        self._asked.popleft()
        return MixedTargets(tuple(parts))

    def close(self) -> None:
        """Drop what is under way."""
        self._asked.clear()
        for reader in self._readers.values():
            reader.close()


WholeAnswer = SoftTargets | MixedTargets  # about the student's rows
Answer = WholeAnswer | PairedTargets
RunReader = TargetReader | RoutingReader


def label_logprobs(answer: WholeAnswer) -> np.ndarray:
    """The teachers' log-probabilities of the labels, or their average's, float32 [N], nats."""
    return _by_position(answer, lambda targets: targets.arrays().label_logprob_N)


def teacher_entropies(answer: WholeAnswer) -> np.ndarray:
    """The entropies that teachers ship with drawn ids, float32 [N], nats."""
    return _by_position(answer, _entropy)


def _entropy(targets: SoftTargets) -> np.ndarray:
    found_N = targets.arrays().entropy_N
    assert found_N is not None, "an entropy is shipped with drawn ids"
    return found_N


def _by_position(answer: WholeAnswer, of: Callable[[SoftTargets], np.ndarray]) -> np.ndarray:
    if isinstance(answer, SoftTargets):
        return of(answer)
    size = max((int(part.index_P[-1]) + 1 for part in answer.parts if len(part.index_P)), default=0)
    found_N = np.full(size, -np.inf, np.float32)
    for part in answer.parts:
        own_P = of(part.targets)
        if part.is_averaged:  # of log-probabilities, the only values asked of an average
            own_P = own_P + np.float32(np.log(part.shares[part.teacher]))
            own_P = np.logaddexp(found_N[part.index_P], own_P)
        found_N[part.index_P] = own_P
    return found_N
