"""The driver: teachers up, controller up, students trained, everything down again in order.

It carries no tokens: students ask teachers directly, and rank 0 alone talks to the controller.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import xxhash

from cluster.preparation import Prepared, prepare_run, run_plan
from cluster.session import attached, connected, prepare_environment
from shared.config import Config, CrossEntropy, Teacher
from shared.errors import ConfigError, TutelageError
from shared.plan import OpenReader, RunPlan
from shared.run_dir import (
    RunDir,
    locked,
    open_run,
    write_atomically,
    write_environment,
)

CONTROLLER = "tutelage-controller"
CONTROLLER_START_S = 120.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A command on a run directory that is locked."""

    prepared: Prepared
    run_dir: RunDir
    attempt: Path  # logs/attempt-N
    service: str | None  # of a teacher that is running already; None: the run starts its own

    @property
    def config(self) -> Config:
        """The run's resolved config."""
        return self.prepared.config


def run(config: Config, *, fresh: bool = False, address: str | None = None) -> RunDir:
    """Distil, from teacher to report, in one job; the same call again continues or is done.

    `config` is resolved. Raises UserErrors before anything starts, TutelageErrors later; what is
    done by then stays, and the same call continues it.
    """
    with _launched(config, fresh=fresh, service=None) as launch:
        if launch is not None:
            with connected(address):
                _distil(launch)
    return RunDir(Path(config.paths.runs) / config.name)


def train(
    config: Config,
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> RunDir:
    """Like `run`, with a teacher service that is running already (`tutelage teacher up`)."""
    name = service or service_name(config)
    with _launched(config, fresh=fresh, service=name) as launch:
        if launch is not None:
            with attached(address):
                _distil(launch)
    return RunDir(Path(config.paths.runs) / config.name)


def evaluate(config: Config, *, address: str | None = None) -> Path:
    """Compare the run's last checkpoint with its teacher; returns `evaluation.json`."""
    run_dir = RunDir(Path(config.paths.runs) / config.name)
    prepare_environment()
    with locked(run_dir):
        launch = Launch(prepare_run(config), run_dir, run_dir.new_attempt(), None)
        with connected(address):
            _place(launch)
            with _teacher(launch) as (plan, open_reader):
                _train(launch, replace(plan, mode="evaluate"), open_reader, replayed=True)
    return run_dir.path / "evaluation.json"


def service_name(config: Config) -> str:
    """What `teacher up` and `train` call the service of a config: the teacher's own name in it."""
    return next(iter(config.teachers))


@contextmanager
def _launched(config: Config, *, fresh: bool, service: str | None) -> Iterator[Launch | None]:
    """Prepared, locked and recorded; None where the run is finished, whose table is printed."""
    prepare_environment()
    prepared = prepare_run(config)
    run_dir = RunDir(Path(config.paths.runs) / config.name)
    with locked(run_dir):
        run_dir = open_run(config, fresh=fresh)
        if _finished(run_dir, config):
            from cluster.summary import final_table

            print(f"{config.name} is finished; --fresh starts it over\n")
            print(final_table(run_dir.path))
            yield None
            return
        yield Launch(prepared, run_dir, run_dir.new_attempt(), service)


def _finished(run_dir: RunDir, config: Config) -> bool:
    return run_dir.finished and (run_dir.baseline.finished or not config.baseline)


def _distil(launch: Launch) -> None:
    import ray

    _place(launch)
    write_environment(launch.run_dir, cluster=ray.cluster_resources())
    try:
        with _teacher(launch) as (plan, open_reader):
            if not launch.run_dir.finished:
                _train_and_summarise(launch, plan, open_reader)
            if launch.config.baseline and not launch.run_dir.baseline.finished:
                _train_baseline(launch, plan, open_reader)
    except KeyboardInterrupt:
        _summarise(launch, status="interrupted")
        raise
    except TutelageError:
        _summarise(launch, status="failed")
        raise
    _say_what_came_out(launch)


def _place(launch: Launch) -> None:
    """Refuse what the cluster has no room for, before anything is asked of it."""
    import ray

    from cluster.placement import (
        refuse_unplaceable,
        refuse_unshared,
        student_bundle,
        teacher_bundle,
    )

    declared, config = ray.cluster_resources(), launch.config
    demands = [("student workers", student_bundle(config, declared))] * config.student.workers
    if launch.service is None and not config.targets.teacher_free:
        teacher = launch.prepared.teacher
        demands += [("teacher replicas", teacher_bundle(teacher, declared))] * teacher.replicas
    refuse_unplaceable(demands)
    refuse_unshared(launch.run_dir.path)


@contextmanager
def _teacher(launch: Launch) -> Iterator[tuple[RunPlan, OpenReader | None]]:
    """The plan and the way to a teacher that serves, for the length of a `with`."""
    from teacher_service import service
    from teacher_service.pool import open_pool

    config, teacher = launch.config, launch.prepared.teacher
    name = launch.service or f"{_namespace(launch.run_dir)}-teacher"
    try:
        if launch.service is None:
            print(f"loading {teacher.replicas} x {teacher.model}", flush=True)
            description = service.start(
                name, teacher, detached=False, cache=config.paths.cache, runtime_env={}
            )
        else:
            _refuse_other_teacher(name, teacher)
            description = service.describe(name)
        for note in description.notes:
            print(note, flush=True)
        reader = partial(
            open_pool,
            service=name,
            teacher=description.fingerprint,
            run=str(launch.run_dir.path),
            in_flight=config.service.in_flight,
            unit_deadline_s=config.service.unit_deadline_s,
            max_unit_failures=config.service.max_unit_failures,
        )
        restarts = _restarts(name)
        try:
            yield (
                run_plan(launch.prepared, run_dir=launch.run_dir.path, teacher=description),
                reader,
            )
        finally:
            _count(launch.run_dir, "teacher_restarts", _restarts(name) - restarts)
    finally:
        if launch.service is None:
            service.stop(name)


def _refuse_other_teacher(name: str, teacher: Teacher) -> None:
    from teacher_service import service

    serving = service.status(name).teacher
    if serving is not None and (serving.model, serving.adapter, serving.quantisation) != (
        teacher.model,
        teacher.adapter,
        teacher.quantisation,
    ):
        raise ConfigError(
            f"teacher service {name} serves {serving.model}, the config asks for {teacher.model}; "
            "name another with --service, or change teachers"
        )


def _train_and_summarise(launch: Launch, plan: RunPlan, open_reader: OpenReader | None) -> None:
    _train(launch, plan, open_reader)
    _summarise(launch, status="finished")


def _train(
    launch: Launch, plan: RunPlan, open_reader: OpenReader | None, *, replayed: bool = False
) -> None:
    """One training with its controller; `replayed` draws the rows that the run drew."""
    import ray

    from cluster import controller
    from cluster.placement import student_bundle
    from cluster.training import Training
    from cluster.training import train as train_students

    config, namespace = launch.config, _namespace(launch.run_dir)
    names, actor = tuple(config.domains), None
    if replayed:
        open_controller = partial(
            controller.ReplayController, str(launch.run_dir.weight_log), names
        )
    else:
        deadline_s = getattr(config.mixture, "deadline_s", CONTROLLER_START_S)
        actor = controller.start_controller(
            controller.ControllerPlan(
                mixture=config.mixture,
                domains=names,
                natural=tuple(domain.natural_weight for domain in plan.domains),
                log_path=str(launch.run_dir.weight_log),
            ),
            name=CONTROLLER,
            namespace=namespace,
            deadline_s=CONTROLLER_START_S,
        )
        open_controller = partial(
            controller.open_controller, CONTROLLER, namespace=namespace, deadline_s=deadline_s
        )
    try:
        restarts = train_students(
            Training(
                plan=plan,
                open_reader=open_reader,
                open_controller=open_controller,
                bundle=student_bundle(config, ray.cluster_resources()),
                attempt=launch.attempt,
            )
        )
        _count(RunDir(Path(plan.run_dir)), "student_restarts", restarts)
    finally:
        if actor is not None:
            controller.stop_controller(CONTROLLER, namespace=namespace)


def _train_baseline(launch: Launch, plan: RunPlan, open_reader: OpenReader | None) -> None:
    """The same student on the same rows with hard labels alone, compared with the same teacher."""
    config = plan.config.model_copy(update={"losses": [CrossEntropy()], "baseline": False})
    print("training the baseline on hard labels alone, on the same rows", flush=True)
    baseline = launch.run_dir.baseline
    for folder in (baseline.path, baseline.logs, baseline.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(baseline.weight_log, launch.run_dir.weight_log.read_text())
    hard = replace(
        plan,
        config=config,
        run_dir=str(baseline.path),
        target_spec=None,
        teacher_width=None,
    )
    _train(launch, hard, open_reader, replayed=True)
    from cluster.summary import summarise

    summarise(baseline.path, status="finished", failures=_failures(baseline))
    _summarise(launch, status="finished")


def _summarise(launch: Launch, *, status: str) -> None:
    from cluster.report import write_report
    from cluster.summary import summarise

    if launch.run_dir.metrics.exists():
        summarise(launch.run_dir.path, status=status, failures=_failures(launch.run_dir))
        write_report(launch.run_dir.path)


def _say_what_came_out(launch: Launch) -> None:
    from cluster.summary import final_table

    print(final_table(launch.run_dir.path), flush=True)


def _namespace(run_dir: RunDir) -> str:
    """One per run folder, so that runs of one name in different places do not meet."""
    return f"{run_dir.path.name}-{xxhash.xxh32_hexdigest(str(run_dir.path).encode())}"


def _restarts(name: str) -> int:
    from teacher_service import service

    try:
        return sum(replica.restarts for replica in service.status(name).replicas)
    except TutelageError:
        return 0  # the service is gone, and what it knew with it


def _count(run_dir: RunDir, what: str, number: int) -> None:
    """Add to the run's failures, over all commands that worked on it."""
    counts = _counts(run_dir)
    counts[what] = counts.get(what, 0) + max(0, number)
    write_atomically(run_dir.logs / "failures.json", json.dumps(counts))


def _counts(run_dir: RunDir) -> dict[str, int]:
    path = run_dir.logs / "failures.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _failures(run_dir: RunDir):
    from cluster.measurement import Failures
    from shared.metrics import read_metrics

    counts = _counts(run_dir)
    return Failures(
        teacher_restarts=counts.get("teacher_restarts", 0),
        student_restarts=counts.get("student_restarts", 0),
        retried_units=sum(line.retried_units for line in read_metrics(run_dir.metrics)),
    )
