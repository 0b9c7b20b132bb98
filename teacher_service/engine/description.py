"""What a teacher is and how it is asked: plain values that need neither torch nor Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.lessons import Learnt, Lesson
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets


@dataclass(frozen=True, slots=True)
class TeacherDescription:
    """Facts about a loaded teacher that the handshake and the student's losses need."""

    fingerprint: dict[str, str]  # everything that can change a bit of an answer
    vocab_rows: int  # rows of the head, padding rows included
    num_layers: int
    hidden_width: int  # of the last hidden state
    state_widths: tuple[int, ...]  # by layer; empty where layers do not give one state per token
    max_context: int | None  # tokens; None where the model has no limit
    packed: bool  # whether packed documents stay apart
    notes: tuple[str, ...] = ()  # sentences the user should read once
    watched: bool = True  # whether a canary sits on it; not where it reads no rows
    num_weights: int = 0  # 0: it has no model, or does not say
    classes: tuple[str, ...] = ()  # of a classifier, in the order of its outputs


class Engine(Protocol):
    """Scores rows and continues text. Knows nothing about Ray, domains or losses. What every one of
    them holds to is in `tests/engines`."""

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        ...

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """Answer one scoring unit in one forward pass; a UserError is final, others are not."""
        ...

    def ship_head(self) -> ShippedHead:
        """Keep the head in the cache; raises a UserError where it cannot be told from the rest."""
        ...

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch of openings; a UserError is final, others are not."""
        ...


@runtime_checkable
class Learner(Protocol):
    """An engine with modules that learn."""

    def learn(self, rows: Rows, lesson: Lesson) -> Learnt:
        """Take one update; a UserError is final, others are not."""
        ...


MakeEngine = Callable[[], Engine]  # picklable; called once in each replica's process
# Makes the engine of a teacher, with the cache and the longest row's length; picklable.
LoadEngine = Callable[[Teacher, str | None, int | None], Engine]
