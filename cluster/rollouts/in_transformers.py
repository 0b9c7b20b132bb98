"""TransformersStudent: the student as its workers load it; a `StudentModel`.

T tokens of a fixed text
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from shared.config.run import Config
from shared.model_parts import longest_context
from shared.targets.generation import Continuations, GenerationSpec, Openings
from student_trainer.losses.kernel.primitive import Head
from student_trainer.models.decoding import decode
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import load_student
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.description import TeacherDescription
from teacher_service.engine.generation.generating import open_generator
from teacher_service.engine.weights import load_weights


class TransformersStudent:
    """Writes as a worker of the student does."""

    def __init__(self, config: Config, *, device: torch.device) -> None:
        """Load it. Raises ConfigError."""
        student = load_student(config, CAUSAL_LM.model, device=device)
        self._student, self._model = student, cast(Any, student.saved.eval())
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
        """See `StudentModel`."""
        return self._description

    def load(self, file: Path) -> None:
        """See `StudentModel`."""
        load_weights(self._model, file)

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`."""
        return self._generator.generate(openings, spec)

    @torch.no_grad()
    def label_logprobs(self, ids_T: np.ndarray) -> np.ndarray:
        """See `StudentModel`. The head is applied as the student's workers do: in fewer bits, sure
        logits alone are off by more than a copy may be."""
        ids, student = torch.from_numpy(ids_T).to(self._model.device), self._student
        text = {
            "input_ids_BT": ids[None],
            "position_ids_BT": torch.arange(len(ids), device=ids.device)[None],
        }
        hidden_TD = decode(student.decoder, text).last_hidden_state[0]
        head = Head(student.head.weight, student.head.bias, student.logit_scale, student.soft_cap)
        return label_logprobs(ids, head.logits(hidden_TD))
