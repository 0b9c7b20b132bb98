"""FollowingEngine: a teacher that is a student of some steps ago; satisfies `Engine`.

It has the student's model. What is asked with a version is answered with that version's weights,
all else with those that were loaded.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.data.rows import Rows
from shared.targets.asks.head_location import ShippedHead
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.canary import is_flat, refuse_flat, refuse_other, whole_text
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import WeightFiles, WeightsRef
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.weights import arrived, load_weights

NO_VERSION = WeightsRef(-1, "")


class FollowingEngine:
    """An engine with weights that a student had."""

    def __init__(self, engine: HFEngine, adapted: Any | None, files: WeightFiles) -> None:
        """`adapted` is the peft model around the engine's own where a student's adapters train
        alone; None: all of its weights do, and those that were loaded are kept on the host."""
        self._engine, self._adapted, self._files = engine, adapted, files
        self._model: nn.Module = engine.model if adapted is None else adapted
        self._loaded: dict[str, torch.Tensor] | None = None
        self._weights: WeightsRef | None = None  # that were loaded last; None: none were

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        return self._engine.describe()

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`; with the weights of the question's version. Raises DamagedError where they
        are not what was pushed, TeacherError where they are not there, EngineError where they do
        not give what they gave the student."""
        with self._at(question.weights):
            return self._engine.score(rows, question)

    def ship_head(self) -> ShippedHead:
        """See `Engine`; the head as it was loaded."""
        with self._at(None):
            return self._engine.ship_head()

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`; as it was loaded."""
        with self._at(None):
            return self._engine.generate(openings, spec)

    @contextmanager
    def _at(self, ref: WeightsRef | None) -> Iterator[None]:
        with ExitStack() as stack:
            if ref is None and self._adapted is not None:
                stack.enter_context(self._adapted.disable_adapter())
            elif ref is None:
                self._restore()
            elif ref != self._weights:
                self._load(ref)
            yield

    @torch.no_grad()
    def _restore(self) -> None:
        """Be what was loaded, where all weights train."""
        if self._weights is not None and self._loaded is not None:
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(self._loaded[name])
        self._weights = None

    def _load(self, ref: WeightsRef) -> None:
        if self._adapted is None and self._loaded is None:
            own = self._model.state_dict().items()
            self._loaded = {name: tensor.to("cpu", copy=True) for name, tensor in own}
        path, canary = arrived(self._files, ref)
        self._weights = NO_VERSION  # a load that fails half way holds none
        load_weights(self._model, path)
        self._refuse_other(ref, canary)
        self._weights = ref

    def _refuse_other(self, ref: WeightsRef, canary: dict[str, Any]) -> None:
        """Raise EngineError where a version does not give its text what it gave the student."""
        ids_T, expected_T = np.array(canary["ids"]), np.array(canary["logprobs"])
        vocab = self._engine.describe().vocab_rows
        answer = self._engine.score(whole_text(ids_T), Question(LikeliestIds(1, vocab)))
        found_T = answer.arrays().label_logprob_N
        engine = f"the teacher, given the student's weights of version {ref.version},"
        if not is_flat(expected_T):  # as that of a student whose head begins with zeros
            refuse_flat(found_T, engine=engine)
        than = "those of the student itself"
        refuse_other(found_T, expected_T, engine=engine, than=than, level=canary["level"])
