"""The service of a run that hosts copies of its student, up while the student is trained."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from cluster.launch.teachers.watch import restarts_of, using
from cluster.launch.writing import open_generator
from cluster.planning.preparation import Launch
from cluster.report.outcome import count
from cluster.rollouts.client import open_copies
from cluster.session.placement import declared, rollouts_role
from shared.config.models.teachers import Autoscaling
from shared.config.run import Config
from shared.errors import StorageError
from shared.run.run_dir import append_progress
from shared.targets.generation import OpenGenerator
from teacher_service.engine.description import Engine
from teacher_service.service import service
from teacher_service.service.pool import AGAIN
from teacher_service.service.scaling.policy import in_words

Writes = Callable[[], OpenGenerator | None]  # waits until what it gives can write


@contextmanager
def writing(launch: Launch) -> Iterator[Writes]:
    """What a run's workers write with, where they write, for the length of a `with`."""
    config = launch.config
    if not (config.source.writes and config.rollouts.serves):
        yield lambda: open_generator if config.source.writes else None
        return
    name, weights = f"{launch.namespace}-rollouts", launch.run_dir.weights
    copies = config.rollouts.served(config.student)
    bounds = copies.replicas
    more = f"; {in_words(bounds)}" if isinstance(bounds, Autoscaling) else ""
    print(f"loading the student to write, {copies.fewest} x {copies.model}{more}", flush=True)
    starting = service.start(
        name,
        copies,
        detached=False,
        role=rollouts_role(declared()),
        make_engine=partial(load_engine, config, str(weights)),
    )
    try:
        roll = launch.run_dir.rollout_replicas
        with using([name], launch.run_dir, gone=AGAIN, what="rollout service", roll=roll):
            yield partial(_opened, launch, starting)
    finally:
        try:
            with suppress(StorageError):  # a full disk must not hide what stopped the run
                count(launch.run_dir, "rollout_restarts", restarts_of(name))
        finally:
            service.stop(name)
            shutil.rmtree(weights, ignore_errors=True)


def load_engine(config: Config, weights: str) -> Engine:
    """The engine of a copy; imported there, so that a driver needs no torch."""
    from cluster.rollouts import engine

    return engine.load_engine(config, weights)


def _opened(launch: Launch, starting: service.Starting) -> OpenGenerator:
    """A way to the copies once they serve. Raises what loading raised."""
    asked, described = launch.config.service, starting.described()
    settings = {
        "service": starting.service,
        "teacher": described.fingerprint,
        "run": str(launch.run_dir.path),
        "in_flight": max(asked.in_flight, launch.config.rollouts.most),
        "unit_deadline_s": asked.unit_deadline_s,
        "max_unit_failures": asked.max_unit_failures,
        "own": True,
        "say": partial(append_progress, launch.run_dir),
    }
    return partial(open_copies, settings=settings)
