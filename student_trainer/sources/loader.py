"""The loader: steps in order from a source of tokens, and the answers to their units.

Units are asked about up to the source's depth ahead of the step under way, but never beyond the
last step whose weights are settled, so that neither prefetch nor a slow controller can change what
is drawn. Where the student names ids to ask about, that depth is 0; where a teacher's modules
learn, at most the lag of those that answer.

D domains in config order   R rows of a unit
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from shared.data.rows import Rows
from shared.errors import TutelageError
from shared.targets.question import Question
from shared.targets.reader import answered
from shared.targets.routing import Answer, RunReader
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.online_teacher import OnlineTeacher
from student_trainer.sources.source import DomainCounts, Drawn, TokenSource
from student_trainer.sources.student_ids import StudentIds

Answers = Iterator[tuple[Rows, Answer]]


class Loader:
    """Steps in order, from any first one on; the reader is asked ahead and answers in order.

    Without a reader or a question no answers are there.
    """

    def __init__(
        self,
        source: TokenSource,
        weight_log: FollowedLog,
        *,
        ranks: Ranks,
        domains: Sequence[str],
        reader: RunReader | None = None,
        question: Question | None = None,
        student_ids: StudentIds | None = None,
        online: OnlineTeacher | None = None,
    ) -> None:
        assert student_ids is None or source.ahead == 0, "its weights would be old"
        self._source, self._weight_log, self._ranks = source, weight_log, ranks
        self._domains, self._student_ids = tuple(domains), student_ids
        self._reader, self._question, self._online = reader, question, online
        self._ahead = source.ahead if online is None else min(source.ahead, online.lag)
        self._drawn: deque[tuple[Drawn, Answers | None]] = deque()
        self._answers: Answers | None = None  # of the step returned last

    def step(self, index: int) -> Step:
        """Step `index`; draws it and the steps ahead and asks about them.

        Waits for the weights of the step itself where the controller has not decided them yet.
        """
        source = self._source
        through = self._weight_log.settle(index, ahead=self._ahead, wait=source.fixed)
        first = self._drawn[-1][0].index + 1 if self._drawn else index
        for ahead in range(first, through + 1):
            drawn = self._source.draw(ahead)
            self._drawn.append((drawn, self._asked(drawn)))
        drawn, self._answers = self._drawn.popleft()
        counts = drawn.counts or self._added_up(drawn.units)
        phase = self._weight_log.ruling(index).phase
        return Step(index, drawn.units, counts.tokens_D, counts.rows_D, phase)

    def answers(self, step: Step) -> Iterator[Answer | None]:
        """The answers to the units of the step returned last, in order, each to be taken once;
        None where no loss needs a teacher.

        All ranks take them together: where one has no answer, all raise its error.
        """
        for _ in step.units:
            yield None if self._answers is None else self._taken(self._answers)

    def _asked(self, drawn: Drawn) -> Answers | None:
        if self._reader is None or self._question is None:
            return None
        own = self._student_ids
        units = [rows.as_asked() for rows in drawn.units]
        units = units if own is None else own.named(units)
        question = self._question
        if self._online is not None:
            question = self._online.question(question, drawn.index)
        return answered(self._reader, units, question, ahead=len(units))

    def _taken(self, answers: Answers) -> Answer:
        targets, error = None, None
        try:
            _, targets = next(answers)
        except TutelageError as failure:
            error = failure
        self._ranks.agree(error)
        assert targets is not None, "an error would have been raised"
        return targets

    def _added_up(self, units: Sequence[Rows]) -> DomainCounts:
        """What all ranks' units hold of each domain."""
        own_2D = np.zeros((2, len(self._domains)))
        for rows in units:
            domain_R = np.array([self._domains.index(name) for name in rows.domains()], np.int64)
            for own_D, weight_R in zip(own_2D, (rows.num_loss_tokens(), None), strict=True):
                own_D += np.bincount(domain_R, weights=weight_R, minlength=len(own_D))
        tokens_D, rows_D = self._ranks.sum(own_2D).astype(np.int64)
        return DomainCounts(tokens_D, rows_D)
