"""Weights of the student pushed as versions to copies of it, which write apart from its workers.

A version is one file in the run's folder, of the weights that train alone: of an adapted student
its adapters. A request names version and digest, so that a copy which was started again, or came
later, finds what it is to write with. Every answer says what the copy makes of a fixed text, which
is compared with what the student itself makes of it.

T tokens of the fixed text   V vocabulary
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shared.config.base import Dtype
from shared.errors import StorageError, TutelageError
from shared.files import obey_umask
from shared.in_words import in_bytes
from shared.run.run_dir import RunDir, append_progress
from shared.targets.canary import (
    COARSE_LEVEL,
    LEVELS,
    is_flat,
    refuse_flat,
    refuse_not_finite,
    refuse_other,
)
from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Generator,
    Openings,
    RemoteGenerator,
)
from shared.targets.weights import CANARY_IDS, WeightFiles, WeightsRef
from student_trainer.engine import gather_weights
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks
from student_trainer.state.shards import probe_logits, reason_of


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
    student: Student
    engine: Any  # a DeepSpeed engine
    ranks: Ranks
    run_dir: RunDir
    dtype: Dtype
    lag: int  # steps between a version and the step that learns what it wrote
    apart: bool = True
    _pushed: Versioned | None = field(default=None)
    _bytes: int = field(default=0)

    def prepare(self, version: int) -> None:
        """See `Writer`; a version is pushed once."""
        if self._pushed is None or self._pushed.weights.version != version:
            self._pushed = self._push(version)

    @contextmanager
    def at(self, version: int) -> Iterator[Generator]:
        """See `Writer`."""
        assert self._pushed is not None, "a version is prepared"
        assert self._pushed.weights.version == version, "the one that writes"
        yield self._pushed

    def take_bytes(self) -> int:
        """See `Writer`."""
        found, self._bytes = self._bytes, 0
        return found

    def waiting(self) -> AbstractContextManager[None]:
        """See `Writer`."""
        return self.generator.waiting()

    def close(self) -> None:
        """See `Writer`."""
        self.generator.close()

    def _push(self, version: int) -> Versioned:
        """Write a version's file; all ranks together. Raises StorageError, or EngineError for a
        student without finite numbers."""
        ids_T, logits_TV = probe_logits(self.engine)
        canary_T = label_logprobs(ids_T, logits_TV)
        refuse_not_finite(canary_T, engine="the student")
        gathered = gather_weights(self.student.saved, trained_only=True)
        ref, error = None, None
        if self.ranks.leads:
            try:
                ref = self._written(version, gathered, ids_T.tolist())
            except TutelageError as failure:
                error = failure
        self.ranks.agree(error)
        ref = self.ranks.from_leader(ref)
        return Versioned(self.generator, ref, canary_T, LEVELS.get(self.dtype, COARSE_LEVEL))

    def _written(
        self, version: int, weights: dict[str, Tensor], canary_ids: list[int]
    ) -> WeightsRef:
        files = WeightFiles(self.run_dir.weights)
        path = files.path(version)
        draft = path.with_name(f".{path.name}.draft")
        try:
            files.folder.mkdir(exist_ok=True)
            files.forget(before=version - self.lag)
            plain = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(plain, draft, metadata={CANARY_IDS: json.dumps(canary_ids)})
            obey_umask(draft)
            draft.replace(path)
            size, digest = path.stat().st_size, files.digest(version)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise StorageError(
                f"version {version} of the student's weights cannot be pushed to {files.folder}: "
                f"{reason_of(error)}; free some space and run the same command again, it resumes "
                "from the last checkpoint"
            ) from None
        if self._pushed is None:
            number = sum(tensor.numel() for tensor in weights.values())
            append_progress(
                self.run_dir,
                f"weights are pushed to the student's copies, {in_bytes(size)} a version: "
                f"{number:,} that train",
            )
        self._bytes += size
        return WeightsRef(version, digest)
