"""What text to learn from is written with: in a student's workers the generator of the teacher
service, around their own model, and a way to the teachers' replicas."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Generator,
    Openings,
    OpenTeachers,
    RemoteGenerator,
)

if TYPE_CHECKING:
    from cluster.planning.preparation import Launch
    from shared.run.plan import RunPlan
    from teacher_service.service.pool import GenerationPool


def open_generator(model: Any, *, device: Any, dtype: str, batch_rows: int) -> Generator:
    """A generator in a worker's process; satisfies `OpenGenerator`."""
    from teacher_service.engine.generation import generating  # slow, and the driver writes nothing

    return generating.open_generator(model, device=device, dtype=dtype, batch_rows=batch_rows)


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas of a teacher that continue openings, `batch_rows` of them at once; satisfies
    `RemoteGenerator`."""

    pool: "GenerationPool"
    batch_rows: int

    def generate(self, openings: Openings, spec: GenerationSpec) -> Continuations:
        """Continue openings. Raises UserError or TeacherError, naming them."""
        starts = range(0, len(openings), self.batch_rows)
        for start in starts:
            stop = min(start + self.batch_rows, len(openings))
            self.pool.submit(openings.at(range(start, stop)), spec)
        return Continuations.joined([self.pool.next() for _ in starts])

    def waiting(self) -> AbstractContextManager[None]:
        """See `RemoteGenerator`."""
        return self.pool.waiting()

    def close(self) -> None:
        """Drop what is under way."""
        self.pool.close()


def teachers_of(launch: "Launch", plan: "RunPlan") -> OpenTeachers:
    """A way to the replicas of every teacher of a plan, for a rank to let them write."""
    from cluster.launch.teachers.serving import (  # slow, and workers import this
        own_services,
        pool_settings,
    )

    services = launch.services or own_services(launch)
    settings = {
        name: pool_settings(
            launch.config,
            services[name],
            teacher=part.teacher or {},
            client=str(launch.run_dir.path),
            own=launch.services is None,
        )
        for name, part in plan.by_teacher.items()
    }
    return partial(_open_teachers, settings=settings, batch_rows=plan.config.source.batch_rows)


def _open_teachers(
    rank: int, *, settings: Mapping[str, dict[str, Any]], batch_rows: int
) -> Mapping[str, RemoteGenerator]:
    from teacher_service.service.pool import GenerationPool

    return {
        name: Replicas(GenerationPool(rank, apart=True, **asked), batch_rows)
        for name, asked in settings.items()
    }
