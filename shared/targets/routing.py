"""Several teachers behind one reader: every row is answered by the teacher of its domain.

A unit is cut by teacher, its rows in their order; each teacher is asked in a question of its own,
and what they say comes back together, in parts.

N positions with loss of a unit   P those of a part
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets

Questions = Mapping[Question, Question]  # the run's -> a teacher's own


@dataclass(frozen=True, slots=True)
class Part:
    """What one teacher says of its rows of a unit."""

    teacher: str
    index_P: np.ndarray  # int64, the positions of the unit that it is about, ascending
    targets: SoftTargets


@dataclass(frozen=True, slots=True)
class MixedTargets:
    """The answers of several teachers to one unit; every position is in one part."""

    parts: tuple[Part, ...]


class RoutingReader:
    """Asks each teacher about the rows of its domains; otherwise as a `TargetReader`.

    `teacher_of` is by domain, `readers` and `questions` are by teacher.
    """

    def __init__(
        self,
        readers: Mapping[str, TargetReader],
        *,
        teacher_of: Mapping[str, str],
        questions: Mapping[str, Questions],
    ) -> None:
        self._readers, self._teacher_of, self._questions = readers, teacher_of, questions
        self._asked: deque[list[tuple[str, np.ndarray]]] = deque()

    @property
    def stats(self) -> ReaderStats:
        """Counters since the reader was made, of all teachers and of each."""
        each = {name: reader.stats for name, reader in self._readers.items()}
        return ReaderStats.summed(each)

    def submit(self, rows: Rows, question: Question) -> None:
        """Ask for a unit; never blocks."""
        own = [self._teacher_of[domain] for domain in rows.domains()]
        num_R = rows.num_loss_tokens()
        asked = []
        for name, reader in self._readers.items():
            is_own_R = [teacher == name for teacher in own]
            if any(is_own_R):
                reader.submit(rows.where(is_own_R), self._questions[name][question])
                asked.append((name, np.flatnonzero(np.repeat(is_own_R, num_R))))
        self._asked.append(asked)

    def next(self) -> MixedTargets:
        """The oldest answer not yet taken, waited for. Raises TeacherError, naming the rows."""
        parts = [
            Part(name, index_P, self._readers[name].next()) for name, index_P in self._asked[0]
        ]
        self._asked.popleft()
        return MixedTargets(tuple(parts))

    def close(self) -> None:
        """Drop what is under way."""
        self._asked.clear()
        for reader in self._readers.values():
            reader.close()


Answer = SoftTargets | MixedTargets
RunReader = TargetReader | RoutingReader


def label_logprobs(answer: Answer) -> np.ndarray:
    """The teachers' log-probabilities of the labels, float32 [N], nats."""
    return _by_position(answer, lambda targets: targets.arrays().label_logprob_N)


def teacher_entropies(answer: Answer) -> np.ndarray:
    """The entropies that teachers ship with drawn ids, float32 [N], nats."""
    return _by_position(answer, _entropy)


def _entropy(targets: SoftTargets) -> np.ndarray:
    found_N = targets.arrays().entropy_N
    assert found_N is not None, "an entropy is shipped with drawn ids"
    return found_N


def _by_position(answer: Answer, of: Callable[[SoftTargets], np.ndarray]) -> np.ndarray:
    if isinstance(answer, SoftTargets):
        return of(answer)
    found_N = np.zeros(sum(len(part.index_P) for part in answer.parts), np.float32)
    for part in answer.parts:
        found_N[part.index_P] = of(part.targets)
    return found_N
