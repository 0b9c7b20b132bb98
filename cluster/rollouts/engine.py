"""StudentEngine: a copy of the student that writes with the version of its weights that a request
names.

T tokens of a fixed text
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shared.config.run import Config
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import WeightFiles, WeightsRef
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.weights import arrived


class StudentModel(Protocol):
    """The student's model as something computes it."""

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        ...

    def load(self, file: Path) -> None:
        """Go on with the weights of a version: those that train, by the names of the student's own
        parameters. Raises TutelageErrors where they are not taken."""
        ...

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`."""
        ...

    def label_logprobs(self, ids_T: np.ndarray) -> np.ndarray:
        """Log-probabilities of a text's tokens but the first [T - 1], nats."""
        ...


def load_engine(config: Config, folder: str) -> "StudentEngine":
    """The student of a config, with versions out of a folder. Raises ConfigError."""
    return StudentEngine(_load_model(config), WeightFiles(Path(folder)))


def _load_model(config: Config) -> StudentModel:
    if config.rollouts.engine == "vllm":
        from cluster.rollouts.in_vllm import VllmStudent

        return VllmStudent(config)
    from cluster.rollouts.in_transformers import TransformersStudent

    on_gpu = config.rollouts.served(config.student).gpus > 0
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("rollouts.gpus asks for a GPU and this process sees none; set it to 0")
    return TransformersStudent(config, device=torch.device("cuda" if on_gpu else "cpu"))


class StudentEngine:
    """Writes, and does nothing else of an `Engine`."""

    def __init__(self, model: StudentModel, files: WeightFiles) -> None:
        self._model, self._files = model, files
        self._weights: WeightsRef | None = None  # that it holds; None: those it was loaded with
        self._canary_ids_T = np.zeros(0, np.int64)

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        return self._model.describe()

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch with the weights that are asked for. Raises DamagedError where they
        are not what was pushed, TeacherError where they are not there."""
        if spec.weights is None:
            raise ConfigError("a copy of the student is asked to write without a version")
        if spec.weights != self._weights:
            self.load_weights(spec.weights)
        answer = self._model.generate(openings, spec)
        return answer.with_canary(self._model.label_logprobs(self._canary_ids_T))

    def load_weights(self, weights: WeightsRef) -> None:
        """Hold the weights of a version from here on. Raises as `generate` does."""
        path, canary = arrived(self._files, weights)
        self._canary_ids_T = np.array(canary["ids"])
        self._weights = None  # a load that fails half way holds no version
        self._model.load(path)
        self._weights = weights

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """Refused."""
        raise ConfigError("a copy of the student writes, and scores nothing; ask a teacher")

    def ship_head(self) -> ShippedHead:
        """Refused."""
        raise ConfigError("a copy of the student writes, and ships no head; ask a teacher")
