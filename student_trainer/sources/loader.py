"""The loader: steps in order from a source of tokens, and the answers to their units.

Units are asked about up to the source's depth ahead of the step under way, but never beyond the
last step whose weights are settled, so that neither prefetch nor a slow controller can change what
is drawn. Where the student names ids to ask about, that depth is 0; where a teacher changes in
training, at most the lag of the version that answers. Where others write blocks, the ranks learn
an earlier one meanwhile, and the units of each are asked about once it is written.

D domains in config order   R rows of a unit
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from shared.data.rows import Rows
from shared.data.teacher_rows import TeacherRows
from shared.errors import TutelageError
from shared.targets.paired import paired
from shared.targets.question import Question
from shared.targets.reader import answered
from shared.targets.routing import Answer, RunReader
from student_trainer.ranks import Ranks
from student_trainer.sources.apart import Apart
from student_trainer.sources.batches import Step
from student_trainer.sources.followed_log import FollowedLog
from student_trainer.sources.source import (
    DomainCounts,
    Drawn,
    FinishDrawn,
    MovingTeacher,
    TokenSource,
)
from student_trainer.sources.student_ids import StudentIds

Answers = Iterator[tuple[Rows, Answer]]
Asked = tuple[Drawn, Answers | None]


class Loader:
    """Steps in order, from any first one on; the reader is asked ahead and answers in order.

    Without a reader or a question no answers are there. With `teacher_rows` the teacher is asked
    about those in place of the units', and answers are `PairedTargets`. What waits until a block is
    written does so `waiting` for its step. Blocks that are written `in_turn` are begun when those
    before them are written on all ranks.
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
        moving: MovingTeacher | None = None,
        waiting: Callable[[int], AbstractContextManager[None]] | None = None,
        in_turn: bool = False,
        teacher_rows: TeacherRows | None = None,
    ) -> None:
        assert student_ids is None or source.ahead == 0, "its weights would be old"
        self._source, self._weight_log, self._ranks = source, weight_log, ranks
        self._domains, self._student_ids = tuple(domains), student_ids
        self._reader, self._question, self._moving = reader, question, moving
        self._ahead = source.ahead if moving is None else min(source.ahead, moving.lag)
        self._drawn: deque[tuple[int, Future[Asked]]] = deque()
        self._answers: Answers | None = None  # of the step returned last
        self._apart, self._waiting = Apart[Asked](ranks), waiting
        self._in_turn, self._teacher_rows = in_turn, teacher_rows
        self._asking = threading.Lock()  # the reader is asked by one thread at a time

    def step(self, index: int) -> Step:
        """Step `index`; draws it and the steps ahead and asks about them. Where steps are drawn on
        time alone, those beyond the end are drawn too, so that a run can take more steps later.

        Waits for the weights of the step itself where the controller has not decided them yet.
        """
        source = self._source
        through = self._weight_log.settle(index, ahead=self._ahead, wait=source.fixed)
        beyond = self._weight_log.ruled_beyond(index, ahead=self._ahead) if source.fixed else 0
        first = self._drawn[-1][0] + 1 if self._drawn else index
        for ahead in range(first, max(through, beyond) + 1):
            self._drawn.append((ahead, self._begun(ahead, is_asked=ahead <= through)))
        self._settle(through=index)
        _, block = self._drawn.popleft()
        drawn, self._answers = block.result()
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

    def settle(self) -> None:
        """Wait until all that is drawn is written, on all ranks together."""
        if self._apart.unsettled:
            self._settle(through=self._apart.unsettled[-1])

    def close(self) -> None:
        """Wait for nothing any more; the source and the reader are closed."""
        self._apart.close()

    def _begun(self, step: int, *, is_asked: bool) -> Future[Asked]:
        """Block `step` and what is asked about it, at once or when it is written."""
        if self._in_turn:
            self.settle()
        question = self._question_at(step) if is_asked else None
        drawn = self._source.draw(step)
        if not callable(drawn):
            return _known((drawn, self._asked(drawn, question)))
        if self._student_ids is None:
            return self._apart.begin(step, partial(self._finished, drawn, question))
        block = self._apart.begin(step, partial(self._finished, drawn, None))
        self.settle()  # the ranks name ids together
        written, _ = block.result()
        return _known((written, self._asked(written, question)))

    def _settle(self, *, through: int) -> None:
        """Wait until blocks are written up to the one of a step, on all ranks together."""
        while (steps := self._apart.unsettled) and steps[0] <= through:
            with self._waiting(steps[0]) if self._waiting else nullcontext():
                self._apart.settle()

    def _finished(self, finish: FinishDrawn, question: Question | None) -> Asked:
        drawn = finish()
        return drawn, self._asked(drawn, question)

    def _question_at(self, step: int) -> Question | None:
        """What is asked about the rows of a step; waits for the version that answers."""
        if self._reader is None or self._question is None or self._moving is None:
            return self._question
        return self._moving.question(self._question, step)

    def _asked(self, drawn: Drawn, question: Question | None) -> Answers | None:
        if self._reader is None or question is None:
            return None
        own = self._student_ids
        units = [rows.as_asked() for rows in drawn.units]
        units = units if own is None else own.named(units)
        if self._teacher_rows is not None:
            units = [self._teacher_rows.of(rows) for rows in units]
        with self._asking:
            return answered(self._reader, units, question, ahead=len(units))

    def _taken(self, answers: Answers) -> Answer:
        rows, targets, error = None, None, None
        try:
            with self._asking:
                rows, targets = next(answers)
        except TutelageError as failure:
            error = failure
        self._ranks.agree(error)
        assert rows is not None, "an error would have been raised"
        assert targets is not None, "an error would have been raised"
        return targets if self._teacher_rows is None else paired(rows, targets)

    def _added_up(self, units: Sequence[Rows]) -> DomainCounts:
        """What all ranks' units hold of each domain."""
        own_2D = np.zeros((2, len(self._domains)))
        for rows in units:
            domain_R = np.array([self._domains.index(name) for name in rows.domains()], np.int64)
            for own_D, weight_R in zip(own_2D, (rows.num_loss_tokens(), None), strict=True):
                own_D += np.bincount(domain_R, weights=weight_R, minlength=len(own_D))
        tokens_D, rows_D = self._ranks.sum(own_2D).astype(np.int64)
        return DomainCounts(tokens_D, rows_D)


def _known(asked: Asked) -> Future[Asked]:
    """A block that is there."""
    block = Future[Asked]()
    block.set_result(asked)
    return block
