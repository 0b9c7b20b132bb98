"""Weights of the student put on disk as versions, for whoever is to have them in another process.

A version is one file, of the weights that train alone: of an adapted student its adapters. Beside
them it holds a fixed text and what the student itself makes of it, by which a copy shows that it
has them.

T tokens of the fixed text   V vocabulary
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from shared.config.base import Dtype
from shared.errors import TutelageError, not_kept
from shared.in_words import in_bytes
from shared.run.run_dir import RunDir, append_progress
from shared.targets.canary import COARSE_LEVEL, LEVELS, refuse_not_finite
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from student_trainer.engine import gather_weights
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks
from student_trainer.state.shards import probe_logits


@dataclass(slots=True)
class Versions:
    """Puts the student's weights of a moment into a folder; all ranks together."""

    student: Student
    engine: Any  # a DeepSpeed engine around the Objective
    ranks: Ranks
    run_dir: RunDir
    files: WeightFiles
    dtype: Dtype
    goes_to: str  # for the line that says what a version is
    _bytes: int = field(default=0)
    _said: bool = field(default=False)

    @property
    def level(self) -> float:
        """Nats that a copy may be off the student on the fixed text."""
        return LEVELS.get(self.dtype, COARSE_LEVEL)

    def put(
        self, version: int, *, is_needed: Callable[[int], bool]
    ) -> tuple[WeightsRef, np.ndarray]:
        """Write a version's file and forget those that are needed no more; returns its name, and
        the student's own log-probabilities of the fixed text [T - 1]. Raises StorageError, or
        EngineError for a student without finite numbers."""
        probe = probe_logits(self.engine)
        ids_T, logits_TV = probe["ids"], probe["logits"]
        canary_T = label_logprobs(ids_T, logits_TV)
        refuse_not_finite(canary_T, engine="the student")
        gathered = gather_weights(self.student.saved, trained_only=True)
        text = {"ids": ids_T.tolist(), "logprobs": canary_T.tolist(), "level": self.level}
        ref, error = None, None
        if self.ranks.leads:
            try:
                self.files.forget(is_needed)
                ref = self._written(version, gathered, {CANARY: json.dumps(text)})
            except TutelageError as failure:
                error = failure
            except OSError as failure:
                what = f"version {version} of the student's weights"
                error = not_kept(what, self.files.folder, failure)
        self.ranks.agree(error)
        return self.ranks.from_leader(ref), canary_T

    def take_bytes(self) -> int:
        """Bytes that this rank has written since the last call."""
        found, self._bytes = self._bytes, 0
        return found

    def _written(
        self, version: int, weights: dict[str, Tensor], metadata: dict[str, str]
    ) -> WeightsRef:
        plain = {name: tensor.contiguous() for name, tensor in weights.items()}
        ref = self.files.write(version, partial(save_file, plain, metadata=metadata))
        size = self.files.path(version).stat().st_size
        if not self._said:
            number = sum(tensor.numel() for tensor in weights.values())
            said = f"{in_bytes(size)} a version: {number:,} that train"
            append_progress(self.run_dir, f"weights are pushed to {self.goes_to}, {said}")
        self._said = True
        self._bytes += size
        return ref
