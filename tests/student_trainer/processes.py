"""What the ranks of a test run do: each job of a folder, by name, in one process group.

The teacher is the real engine, in the student's own process.
"""

import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.launch.teachers.following import follow
from cluster.rollouts.engine import load_engine
from shared.config.models.modules import TrainedModules
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import TutelageError
from shared.prompts.prefix import PromptedReader
from shared.run.plan import OpenController, OpenRunReader, RunPlan, open_routing
from shared.run.run_dir import RunDir
from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Generator,
    OpenGenerator,
    Openings,
)
from shared.targets.lessons import Learnt, Lesson
from shared.targets.question import Question
from shared.targets.reader import ReaderStats, TargetReader
from shared.targets.soft_targets import SoftTargets
from shared.targets.weights import ModuleFiles
from student_trainer.accelerator import join, this_device
from student_trainer.loop import run_plan
from student_trainer.ranks import Ranks
from student_trainer.sources.data_set import DataSet
from student_trainer.sources.source import OpenSource
from student_trainer.tasks.task import Task
from student_trainer.torchrun import StandingWeights, read_plan, write_plan
from teacher_service.engine.description import Engine
from teacher_service.engine.generation.generating import open_generator
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.learning import LearningEngine


class LocalTeacher:
    """A `TargetReader` around an engine in this process."""

    def __init__(self, *engines: Engine) -> None:
        self._engines, self._asked = cycle(engines), deque[tuple[Rows, Question]]()
        self.stats = ReaderStats()

    def submit(self, rows: Rows, spec: Question) -> None:
        self._asked.append((rows, spec))

    def next(self) -> SoftTargets:
        rows, spec = self._asked.popleft()
        targets = next(self._engines).score(rows, spec)
        targets.check(rows, spec)
        self.stats.units += 1
        self.stats.wire_bytes += targets.num_bytes
        return targets

    def close(self) -> None:
        self._asked.clear()


@cache
def teacher(folder: str) -> HFEngine:
    return HFEngine.load(folder)


@cache
def learners(plan_folder: str, *, asked: str, folder: str, number: int) -> list[LearningEngine]:
    """As many replicas of a teacher with modules, for the run in a folder."""
    files, modules = ModuleFiles(RunDir(Path(plan_folder)).modules), json.loads(asked)
    settings = TrainedModules.model_validate(modules)
    engines = [teacher(folder), *(HFEngine.load(folder) for _ in range(1, number))]
    return [LearningEngine(engine, settings, seed=0, files=files) for engine in engines]


def followers(plan: RunPlan, number: int) -> list[Engine]:
    """As many replicas of a teacher that follows a plan's student."""
    (section,) = plan.config.teachers.values()
    settings = {"dtype": section.dtype, "quantisation": section.quantisation}
    load = partial(HFEngine.load, section.model, **settings)
    folder = str(RunDir(Path(plan.run_dir)).followed)
    return [follow(load, plan.config, folder=folder) for _ in range(number)]


def replicas_of(plan: RunPlan, teacher_section: Teacher) -> list[Engine]:
    """The engines of a plan's teacher in this process."""
    if teacher_section.follow_student is not None:
        return [*followers(plan, teacher_section.fewest)]
    if teacher_section.online_modules is None:
        return [teacher(teacher_section.model)]
    asked = teacher_section.online_modules.model_dump_json()
    number, folder = teacher_section.fewest, teacher_section.model
    return [*learners(plan.run_dir, asked=asked, folder=folder, number=number)]


class LocalModules:
    """A `ModuleTrainer` around engines in this process."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines, self._asked = cycle(engines), deque[tuple[Rows, Lesson]]()

    def submit(self, rows: Rows, lesson: Lesson) -> None:
        self._asked.append((rows, lesson))

    def next(self) -> Learnt:
        rows, lesson = self._asked.popleft()
        learnt = next(self._engines).learn(rows, lesson)
        learnt.check(rows, lesson)
        return learnt

    def close(self) -> None:
        self._asked.clear()


def modules_of(plan: RunPlan) -> LocalModules:
    (section,) = plan.config.teachers.values()
    return LocalModules(replicas_of(plan, section))


def as_job(kind: str, plan: RunPlan, **arguments: object) -> dict:
    """A plan as an entry of a job file."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        write_plan(Path(file.name), plan)
        return {"kind": kind, "plan": json.loads(Path(file.name).read_text()), **arguments}


def run(
    plan: RunPlan,
    open_controller: OpenController | None = None,
    *,
    open_source: OpenSource = DataSet,
    task: Task | None = None,
    delay_s: float = 0.0,
) -> None:
    """Run a plan with its teacher in this process, by default under fixed weights; copies of the
    student take `delay_s` longer for whatever they write."""
    controller = open_controller or (lambda: StandingWeights(plan))
    run_plan(
        plan,
        reader_of(plan),
        controller,
        open_source=open_source,
        task=task,
        open_generator=hosted(plan, delay_s) if plan.config.rollouts.serves else open_generator,
        open_teachers=partial(teachers_of, plan=plan),
        open_modules=partial(modules_of, plan),
    )


class LocalWriter:
    """A `RemoteGenerator` around an engine in this process."""

    def __init__(self, engine: Generator, delay_s: float = 0.0) -> None:
        self._engine, self._delay_s = engine, delay_s

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        time.sleep(self._delay_s)
        return self._engine.generate(openings, spec)

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """Nothing is under way."""


def teachers_of(rank: int, *, plan: RunPlan) -> dict[str, LocalWriter]:
    """The teachers of a plan, as they write."""
    return {n: LocalWriter(teacher(asked.model)) for n, asked in plan.config.teachers.items()}


def hosted(plan: RunPlan, delay_s: float) -> OpenGenerator:
    """What a service of the student's copies would open, with one copy in this process."""
    weights = str(RunDir(Path(plan.run_dir)).weights)

    def opened(model: None, *, device: object, dtype: str, batch_rows: int) -> Generator:
        assert model is None, "a worker whose copies write has nothing to write with"
        return LocalWriter(load_engine(plan.config, weights), delay_s)

    return opened


def local_reader(plan: RunPlan, asked: Teacher) -> TargetReader:
    """A teacher in this process, shown the plan's prompts where it has any."""
    reader = LocalTeacher(*replicas_of(plan, asked))
    return PromptedReader(reader, plan.openings) if plan.openings else reader


def reader_of(plan: RunPlan) -> OpenRunReader | None:
    """A way to a plan's teachers in this process, None where no loss asks any."""
    readers = {
        name: (lambda rank, asked=asked: local_reader(plan, asked))
        for name, asked in plan.config.teachers.items()
    }
    needs_teacher = plan.config.needs_teacher
    return partial(open_routing, plan=plan, readers=readers) if needs_teacher else None


def job_train(plan: RunPlan, *, task: Task | None = None) -> dict:
    """Train; a refusal is a result, and so are the seeds that all ranks were left with."""
    try:
        run(plan, task=task)
    except TutelageError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "seeds": Ranks().gather(torch.initial_seed())}


def main(meeting: str, jobs: dict[str, Callable[..., dict]]) -> None:
    """Do the jobs of every folder that is named on standard input, until it ends."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", meeting, rank=rank, world_size=size)
    join(this_device())
    for line in sys.stdin:
        _do(Path(line.strip()), jobs)


def _do(folder: Path, jobs: dict[str, Callable[..., dict]]) -> None:
    """The jobs of a folder; rank 0 writes the results after each."""
    results = []
    for job in json.loads((folder / "jobs.json").read_text()):
        with tempfile.NamedTemporaryFile(suffix=".json", mode="w") as file:
            json.dump(job.pop("plan"), file)
            file.flush()
            plan = read_plan(Path(file.name))
        results.append(jobs[job.pop("kind")](plan, **job))
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    (folder / f"done-{dist.get_rank()}").touch()


if __name__ == "__main__":
    from tests.student_trainer import jobs

    main(sys.argv[1], jobs.JOBS)
