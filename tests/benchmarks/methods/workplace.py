"""One process in which cells run one after the other: a teacher, its answers, a group of one rank.

Answers of a payload are asked for once: those a run trains on lie in a target store on disk, those
over the whole vocabulary, which validation compares with, stay in memory.
"""

import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from cluster.planning.preparation import Prepared
from shared.data.rows import Rows
from shared.prompts.prefix import PromptedReader
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from shared.store.readers import RecordingReader
from shared.targets.asks.kept_ids import KeptIds
from shared.targets.lessons import Learnt
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import ModuleFiles
from teacher_service.engine.description import Engine
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.learning import LearningEngine
from tests.student_trainer.processes import LocalModules, LocalTeacher, LocalWriter


class TimedTeacher(LocalTeacher):
    """The teacher in this process; `cpu_s` and `tokens` are of what it scored."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.cpu_s, self.tokens = 0.0, 0

    def next(self) -> SoftTargets:
        """The oldest answer, scored now."""
        rows, start = self._asked[0][0], time.process_time()
        targets = super().next()
        self.cpu_s += time.process_time() - start
        self.tokens += int(rows.num_loss_tokens().sum())
        return targets


class TimedModules(LocalModules):
    """Modules of that teacher; what they take counts as its own."""

    def __init__(self, teacher: TimedTeacher, engine: LearningEngine | None) -> None:
        super().__init__([engine])
        self._teacher = teacher

    def next(self) -> Learnt:
        """The oldest lesson, learnt now."""
        start = time.process_time()
        learnt = super().next()
        self._teacher.cpu_s += time.process_time() - start
        return learnt


@dataclass(slots=True)
class Remembered:
    """A `TargetReader` that keeps every answer in memory, for units that come again and again."""

    reader: TargetReader
    known: dict[tuple, SoftTargets]
    asked: deque[tuple] = field(default_factory=deque)

    @property
    def stats(self) -> ReaderStats:
        """Of the reader inside."""
        return self.reader.stats

    def submit(self, rows: Rows, spec: Question) -> None:
        """Ask for a unit."""
        key = (spec, *rows.hashes())
        if key not in self.known and key not in self.asked:
            self.reader.submit(rows, spec)
        self.asked.append(key)

    def next(self) -> SoftTargets:
        """The oldest answer."""
        key = self.asked.popleft()
        if key not in self.known:
            self.known[key] = self.reader.next()
        return self.known[key]

    def close(self) -> None:
        """Drop what was asked for."""
        self.asked.clear()
        self.reader.close()


class SharedTargets:
    """What a run reads from: payloads for training through the store, whole vocabularies not."""

    def __init__(self, stored: TargetReader, whole: TargetReader, *, vocabulary: int) -> None:
        self._stored, self._whole, self._vocabulary = stored, whole, vocabulary
        self._turns: deque[TargetReader] = deque()

    @property
    def stats(self) -> ReaderStats:
        """Of what a run trains on."""
        return self._stored.stats

    def submit(self, rows: Rows, spec: Question) -> None:
        """Ask for a unit."""
        whole = isinstance(spec.ask, KeptIds) and spec.ask.num_ids >= self._vocabulary
        reader = self._whole if whole else self._stored
        self._turns.append(reader)
        reader.submit(rows, spec)

    def next(self) -> SoftTargets:
        """The oldest answer."""
        return self._turns.popleft().next()

    def close(self) -> None:
        """Close the store's files."""
        self._turns.clear()
        self._stored.close()


class Workplace:
    """The teacher and its answers, loaded once; cells run in it one after the other."""

    def __init__(self, folder: Path, *, root: Path) -> None:
        self.folder, self.root = folder, root
        self._engines: dict[str, HFEngine] = {}
        self._whole: dict[tuple, SoftTargets] = {}
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def engine(self, model: str) -> HFEngine:
        """A teacher by its folder."""
        if model not in self._engines:
            self._engines[model] = HFEngine.load(model)
            self._engines[model].cache = str(self.folder / "cache")
        return self._engines[model]

    def learning(self, prepared: Prepared, folder: Path) -> LearningEngine | None:
        """The teacher with the modules that learn beside a run's student, whose versions lie in its
        folder; None where none do."""
        asked, seed = prepared.config.modules, prepared.config.seed
        if asked is None:
            return None
        engine, files = self.engine(prepared.teacher.model), ModuleFiles(RunDir(folder).modules)
        return LearningEngine(engine, asked, seed=seed, files=files)

    def reader(
        self, prepared: Prepared, learning: LearningEngine | None = None
    ) -> tuple[TargetReader, TimedTeacher]:
        """A reader of a run's own, and the teacher behind its store, which one that is `learning`
        has not. The store's answers are to the teacher shown the run's prompts, whole vocabularies
        to the teacher without."""
        engine = self.engine(prepared.teacher.model)
        teacher, comparing = TimedTeacher(learning or engine), LocalTeacher(engine)
        folder, named = self.folder / "targets", engine.fingerprint
        stored = teacher if learning else RecordingReader(teacher, folder, teacher=named)
        whole = Remembered(comparing, self._whole)
        reader = SharedTargets(
            _prompted(stored, prepared), whole, vocabulary=prepared.facts.shared_vocab
        )
        return reader, teacher

    def writers(self, plan: RunPlan) -> dict[str, LocalWriter]:
        """The teachers of a plan, as they write."""
        asked = plan.config.teachers.items()
        return {name: LocalWriter(self.engine(teacher.model)) for name, teacher in asked}

    def asked(self, prepared: Prepared) -> TargetReader:
        """The teacher shown a run's prompts, past any store."""
        return _prompted(LocalTeacher(self.engine(prepared.teacher.model)), prepared)


def _prompted(reader: TargetReader, prepared: Prepared) -> TargetReader:
    openings = prepared.showing.openings
    return PromptedReader(reader, openings) if openings else reader
