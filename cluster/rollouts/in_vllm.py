"""VllmStudent: the student as vLLM holds it, in an environment of its own; a `StudentModel`.

Its model is loaded as it lies on disk, and the versions are loaded into it where it runs: all
weights of a student that trains whole, or adapters on the model. What it draws from is vLLM's own
generator with a seed of each opening, so its texts are others than those of `TransformersStudent`.

T tokens of a fixed text
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.config.models.student import LoRATraining
from shared.config.run import Config
from shared.errors import ConfigError, TeacherError
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.canary import whole_text
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from teacher_service.engine.description import TeacherDescription
from teacher_service.service.replicas.environments import load_vllm


class VllmStudent:
    """Writes with a student's weights in vLLM."""

    def __init__(self, config: Config) -> None:
        """Load it. Raises ConfigError."""
        self._python = config.rollouts.python
        self._engine = load_vllm(
            config.rollouts.served(config.student),
            context=config.data.context,
            section="rollouts",
            adapters=_adapters(config),
        )

    def describe(self) -> TeacherDescription:
        """See `StudentModel`."""
        return replace(self._engine.describe(), watched=False)  # its weights change

    def load(self, file: Path) -> None:
        """See `StudentModel`. Raises ConfigError where vLLM does not take them."""
        try:
            self._engine.load_weights(str(file))
        except TeacherError as error:
            raise ConfigError(
                f"vllm in {self._python} does not take the student's weights of {file.name}: "
                f"{error}; change student.train.target_modules, or set "
                "rollouts.engine=transformers"
            ) from error

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`."""
        return self._engine.generate(openings, spec)

    def label_logprobs(self, ids_T: np.ndarray) -> np.ndarray:
        """See `StudentModel`."""
        vocab = self._engine.describe().vocab_rows
        answer = self._engine.score(whole_text(ids_T), Question(LikeliestIds(1, vocab)))
        return answer.arrays().label_logprob_N


def _adapters(config: Config) -> dict[str, Any] | None:
    """Rank and alpha of the adapters that train, as peft's config has them; None: all weights
    do."""
    train = config.student.train
    if not isinstance(train, LoRATraining):
        return None
    return {"r": train.r, "lora_alpha": train.alpha}
