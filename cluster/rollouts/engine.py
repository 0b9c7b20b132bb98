"""StudentEngine: a copy of the student that writes with the version of its weights that a request
names.

T tokens of a fixed text   V vocabulary
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from shared.config.run import Config
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.model_parts import longest_context
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import WeightFiles, WeightsRef
from student_trainer.losses.kernel.primitive import Head
from student_trainer.models.decoding import decode
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import load_student
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.generation.generating import open_generator
from teacher_service.engine.weights import arrived, load_weights


def load_engine(config: Config, folder: str) -> "StudentEngine":
    """The student of a config, as its workers load it, with versions out of a folder. Raises
    ConfigError."""
    on_gpu = config.rollouts.served(config.student).gpus > 0
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("rollouts.gpus asks for a GPU and this process sees none; set it to 0")
    return StudentEngine(config, folder, device=torch.device("cuda" if on_gpu else "cpu"))


class StudentEngine:
    """Writes, and does nothing else of an `Engine`."""

    def __init__(self, config: Config, folder: str, *, device: torch.device) -> None:
        student = load_student(config, CAUSAL_LM.model, device=device)
        self._student, self._model = student, cast(Any, student.saved.eval())
        self._files = WeightFiles(Path(folder))
        self._weights: WeightsRef | None = None  # that it holds; None: those it was loaded with
        self._canary_ids_T = torch.zeros(0, dtype=torch.int64)
        kind = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        fingerprint = {
            "model": "the student",
            "dtype": config.student.dtype,
            "engine": f"torch {torch.__version__} transformers {transformers.__version__}",
            "device": kind,
            "threads": str(torch.get_num_threads()),
        }
        self._generator = open_generator(
            self._model,
            device=device,
            dtype=config.student.dtype,
            batch_rows=config.source.batch_rows,
            fingerprint=fingerprint,
        )
        text = self._model.config.get_text_config()
        self._description = TeacherDescription(
            fingerprint=fingerprint,
            vocab_rows=student.vocab_size,
            num_layers=text.num_hidden_layers,
            hidden_width=student.width,
            state_widths=(),
            max_context=longest_context(text),
            packed=False,
            watched=False,
        )

    def describe(self) -> TeacherDescription:
        """What was loaded."""
        return self._description

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue one batch with the weights that are asked for. Raises DamagedError where they
        are not what was pushed, TeacherError where they are not there."""
        if spec.weights is None:
            raise ConfigError("a copy of the student is asked to write without a version")
        if spec.weights != self._weights:
            self.load_weights(spec.weights)
        answer = self._generator.generate(openings, spec)
        return answer.with_canary(self._canary())

    def load_weights(self, weights: WeightsRef) -> None:
        """Hold the weights of a version from here on. Raises as `generate` does."""
        path, canary = arrived(self._files, weights)
        self._canary_ids_T = torch.tensor(canary["ids"])
        self._weights = None  # a load that fails half way holds no version
        load_weights(self._model, path)
        self._weights = weights

    @torch.no_grad()
    def _canary(self) -> np.ndarray:
        """Log-probabilities of the fixed text [T - 1] that came with the weights, nats. The head is
        applied as the student's workers do: in fewer bits, sure logits alone are off by more than a
        copy may be."""
        ids_T, student = self._canary_ids_T.to(self._model.device), self._student
        text = {
            "input_ids_BT": ids_T[None],
            "position_ids_BT": torch.arange(len(ids_T), device=ids_T.device)[None],
        }
        hidden_TD = decode(student.decoder, text).last_hidden_state[0]
        head = Head(student.head.weight, student.head.bias, student.logit_scale, student.soft_cap)
        return label_logprobs(ids_T, head.logits(hidden_TD))

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """Refused."""
        raise ConfigError("a copy of the student writes, and scores nothing; ask a teacher")

    def ship_head(self) -> ShippedHead:
        """Refused."""
        raise ConfigError("a copy of the student writes, and ships no head; ask a teacher")
