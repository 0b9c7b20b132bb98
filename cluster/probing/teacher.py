"""What a teacher's replica does in a probe: it answers as ever, and its memory and time are
counted."""

import gc
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist

from cluster.probing.following import Chunks, Followed
from cluster.probing.memory import ResidentPeak, live_tensors, resident_bytes, storage_bytes
from cluster.sizing.fitting import GPU_LIBRARIES
from cluster.sizing.measured import STEP_PART, Logits, ProcessMemory, TeacherProbe, write
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.targets.asks.head_location import ShippedHead
from shared.targets.generation import Continuations, GenerationSpec, Openings
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.engine.audit import load_engine
from teacher_service.engine.description import Engine, TeacherDescription


def probed_engine(
    teacher: Teacher,
    cache: str | None,
    context: int | None,
    *,
    name: str,
    chunks: Chunks,
    folder: Path,
) -> Engine:
    """The engine that a config asks for, counted; what it takes is written to `folder`."""
    engine = load_engine(teacher, cache=cache, context=context)
    device = torch.device("cuda" if teacher.gpus > 0 else "cpu")
    kept = folder / f"teacher-{name}-{gethostname()}-{os.getpid()}.json"
    return ProbedEngine(engine, device, chunks, kept)


@dataclass(slots=True)
class Tally:
    """The units of one question so far."""

    tokens: int = 0
    seconds: float = 0.0
    timed: int = 0
    followed: int = 0
    largest: int = 0  # tokens
    widest: Logits | None = None


class ProbedEngine:
    """Answers as an engine does; follows the operations of every unit that is larger than those
    before it. Satisfies `Engine`."""

    def __init__(self, engine: Engine, device: torch.device, chunks: Chunks, path: Path) -> None:
        self._engine, self._device, self._chunks, self._path = engine, device, chunks, path
        gc.collect()  # what loading left
        self._weights = storage_bytes(live_tensors(device))
        self._on_gpu = device.type == "cuda"
        self._libraries = GPU_LIBRARIES if self._on_gpu else resident_bytes() - self._weights
        self._step, self._by_question = 0, dict[str, Tally]()
        self._resident = ResidentPeak().__enter__()  # as long as the process

    @property
    def head(self) -> Any:
        """What `HFEngine` ships, of which a process of a spread replica has a part."""
        return self._engine.head  # type: ignore[attr-defined]

    def describe(self) -> TeacherDescription:
        """See `Engine`."""
        return self._engine.describe()

    def ship_head(self) -> ShippedHead:
        """See `Engine`."""
        return self._engine.ship_head()

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """See `Engine`."""
        return self._engine.generate(openings, spec)

    def score(self, rows: Rows, question: Question) -> SoftTargets:
        """See `Engine`."""
        tokens, key = sum(map(len, rows.column("input_ids"))), json.dumps(question.as_dict())
        asked = self._by_question.setdefault(key, Tally())
        if tokens > asked.largest:
            asked.largest = tokens
            answer = self._followed(rows, question, asked)
        else:
            started = time.perf_counter()
            answer = self._engine.score(rows, question)
            asked.seconds += time.perf_counter() - started
            asked.tokens += tokens
            asked.timed += 1
        self._write()
        return answer

    def _followed(self, rows: Rows, question: Question, asked: Tally) -> SoftTargets:
        asked.followed += 1
        with Followed(self._chunks, live_tensors(self._device)) as followed:
            answer = self._engine.score(rows, question)
        most = followed.most
        if self._on_gpu:
            most = torch.cuda.max_memory_allocated(self._device) - self._weights
        self._step = max(self._step, most)
        chunks, positions = self._chunks, int(rows.num_loss_tokens().sum())
        asked.widest = Logits(followed.widest, positions, chunks.rows, chunks.vocabularies[0])
        return answer

    def _write(self) -> None:
        """Keep what is known; the question of training is that of most units."""
        training = max(self._by_question.values(), key=lambda asked: asked.timed)
        parts: dict[str, Any] = {"weights": self._weights, STEP_PART: self._step}
        most = self._resident.most
        if self._on_gpu:
            most = torch.cuda.max_memory_reserved(self._device) + self._libraries
        beyond = most - self._libraries - sum(parts.values())
        memory = ProcessMemory(parts, max(0, beyond), self._libraries)
        found = TeacherProbe(
            memory=memory,
            logits=training.widest,
            tokens=training.tokens,
            seconds=training.seconds,
            timed=training.timed,
            followed=training.followed,
            leads=not dist.is_initialized() or dist.get_rank() == 0,
        )
        write(self._path, found)
