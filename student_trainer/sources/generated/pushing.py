"""Weights of the student pushed as versions to copies of it, which write apart from its workers.

A version is one file in the run's folder, of the weights that train alone: of an adapted student
its adapters. A request names version and digest, so that a copy which was started again, or came
later, finds what it is to write with. Every answer says what the copy makes of a fixed text, which
is compared with what the student itself makes of it.

T tokens of the fixed text   V vocabulary
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from shared.targets.canary import is_flat, refuse_flat, refuse_other
from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Generator,
    Openings,
    RemoteGenerator,
)
from shared.targets.weights import WeightsRef
from student_trainer.state.versions import Versions


@dataclass(frozen=True, slots=True)
class Versioned:
    """A generator asked with weights of one version; satisfies `Generator`."""

    generator: Generator
    weights: WeightsRef
    canary_T: np.ndarray  # the student's own log-probabilities of the fixed text
    level: float  # nats that a copy's may differ from them

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Generator`. Raises EngineError where other weights wrote the answer."""
        answer = self.generator.generate(openings, replace(spec, weights=self.weights))
        copy = f"a copy of the student that was given weights of version {self.weights.version}"
        for found_T in answer.canaries():
            if not is_flat(self.canary_T):  # as that of a student whose head begins with zeros
                refuse_flat(found_T, engine=copy)
            than = "those of the student itself"
            refuse_other(found_T, self.canary_T, engine=copy, than=than, level=self.level)
        return answer


@dataclass(slots=True)
class Pusher:
    """Has copies of the student write with its weights of the moment; a `Writer`."""

    generator: RemoteGenerator  # asks the copies
    versions: Versions
    lag: int  # steps between a version and the step that learns what it wrote
    apart: bool = True
    _pushed: dict[int, Versioned] = field(default_factory=dict)  # those that may write yet

    def prepare(self, version: int) -> None:
        """See `Writer`; a version is pushed once."""
        if version in self._pushed:
            return
        oldest = version - self.lag
        ref, canary_T = self.versions.put(version, is_needed=lambda v: v >= oldest)
        kept = {v: pushed for v, pushed in self._pushed.items() if v >= oldest}
        own = Versioned(self.generator, ref, canary_T, self.versions.level)
        self._pushed = kept | {version: own}

    @contextmanager
    def at(self, version: int) -> Iterator[Generator]:
        """See `Writer`."""
        yield self._pushed[version]

    def take_bytes(self) -> int:
        """See `Writer`."""
        return self.versions.take_bytes()

    def waiting(self) -> AbstractContextManager[None]:
        """See `Writer`."""
        return self.generator.waiting()

    def close(self) -> None:
        """See `Writer`."""
        self.generator.close()
