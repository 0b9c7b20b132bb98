"""Commands on teacher services that outlive runs."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.session import ray_head
from cluster.session.interrupts import interrupted_as
from cluster.session.services import find_service, named_services, reached, services_of
from cluster.session.session import attached, connected, find_address, is_connected
from shared.config.models.teachers import Autoscaling, Teacher
from shared.config.paths import without_job_folder
from shared.errors import ConfigError

if TYPE_CHECKING:
    from teacher_service.service.service import ServiceStatus

INTERRUPTED = "Interrupted; the same command starts what does not serve yet."


def up(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """`tutelage teacher up`: start the config's teachers and leave them serving."""
    from cluster.launch.teachers.modules import refuse_shared_service
    from cluster.planning.folders import refuse_incomplete_teacher
    from cluster.planning.handshake import describe_teacher, refuse_attention
    from cluster.planning.loading import made, read

    config = made(read(path, overrides).model_copy(update={"stages": {}}))
    refuse_shared_service(config)
    names = services_of(config, service) or named_services(config)
    for key, teacher in config.teachers.items():
        refuse_incomplete_teacher(key, teacher)
        if teacher.attention != "auto":
            described = describe_teacher(key, teacher, cache=Path(config.paths.cache))
            refuse_attention(f"teachers.{key}", teacher, described)
    teachers = {names[key]: teacher for key, teacher in config.teachers.items()}
    with interrupted_as(lambda: INTERRUPTED), reached(address, None):
        _refuse_unplaceable(teachers)
        with connected(address, outlives=True):
            _up(teachers, cache=config.paths.cache, context=config.data.context)
    there = f" --address {address}" if address else ""
    print(f"Train    tutelage train {path}{there}")
    for name in names.values():
        which = f" --service {name}" if len(names) > 1 else ""
        print(f"Stop     tutelage teacher down{which}{there}")


def _refuse_unplaceable(teachers: Mapping[str, Teacher]) -> None:
    """Refuse services that do not run yet and have no room, on the cluster that is there or else
    this machine. Raises PlacementError."""
    from cluster.session.placement import refuse_unplaceable_here, teachers_demands
    from teacher_service.service import service as services

    running = services.list_services() if is_connected() else []
    absent = {name: teacher for name, teacher in teachers.items() if name not in running}
    if absent:
        refuse_unplaceable_here(partial(teachers_demands, absent))


def _up(teachers: Mapping[str, Teacher], *, cache: str, context: int) -> None:
    """Start services by their names."""
    from teacher_service.service import service as services

    print(f"loading {', '.join(teacher.model for teacher in teachers.values())}", flush=True)
    started = services.start_all(teachers, detached=True, cache=cache, context=context)
    for name, description in started:
        for note in description.notes:
            print(note)
        served = _resized(name, teachers[name].replicas, only=len(teachers) == 1)
        print(f"teacher service {name} serves {teachers[name].model} with {served}")


def _resized(name: str, asked: int | Autoscaling, *, only: bool) -> str:
    """Give a service the number or the bounds of replicas that a config asks for; returns what it
    has."""
    from teacher_service.service import service as services
    from teacher_service.service.scaling.policy import in_words

    scale = services.status(name).scale
    bounds = scale.bounds if scale else None
    if bounds != (asked if isinstance(asked, Autoscaling) else None):
        services.rescale(name, asked)
    if isinstance(asked, Autoscaling):
        return in_words(asked)
    return _replicas(_grown(name, asked, only=only))


def _grown(name: str, asked: int, *, only: bool) -> int:
    """Give a service that ran before the replicas it lacks; returns how many it has. None is taken
    away, since students may be using them."""
    from teacher_service.service import service as services

    there = len(services.status(name).replicas)
    if there < asked:
        services.scale(name, asked)
        print(f"teacher service {name}: {there} -> {_replicas(asked)}")
    elif there > asked:
        print(
            f"teacher service {name} keeps its {there} replicas, more than the {asked} asked for; "
            f"`tutelage teacher scale {asked}{'' if only else f' --service {name}'}` takes some "
            "away"
        )
    return max(there, asked)


def scale(replicas: int, *, service: str | None = None, address: str | None = None) -> None:
    """`tutelage teacher scale`."""
    with attached(address):
        from teacher_service.service import service as services

        name = find_service(service)
        before = services.scale(name, replicas)
        print(f"teacher service {name}: {before} -> {_replicas(replicas)}")


def status(*, service: str | None = None, address: str | None = None) -> None:
    """`tutelage teacher status`: a line per replica."""
    with attached(address):
        from teacher_service.service import service as services

        names = [service] if service else services.list_services()
        for name in names:
            found = services.status(name)
            known = found.teacher and without_job_folder(found.teacher.model)
            model = known or "no registry; a leftover"
            print(f"{name}  {model}{_scaling(found)}")
            for replica in found.replicas:
                health = replica.health
                work = f"{health.units} units, {health.tokens:,} tokens" if health else "no answer"
                print(f"  {replica.name}  {replica.state}  {work}, {replica.restarts} restarts")
        if not names:
            print("no teacher service is running; `tutelage teacher up CONFIG` starts one")


def down(
    *,
    service: str | None = None,
    address: str | None = None,
    everything: bool = False,
    force: bool = False,
) -> None:
    """`tutelage teacher down`; with `everything` also the cluster that `up` started, with `force`
    also services that commands use."""
    if everything and address is None and find_address() is None:
        ray_head.reap()
        print("nothing is running")
        return
    with attached(address):
        from teacher_service.service import service as services

        names = services.list_services() if everything else [find_service(service)]
        for name in names:
            if users := services.users(name):
                _refuse_in_use(name, users, force=force)
        for name in names:
            services.stop(name)
            print(f"teacher service {name} is stopped")
    if everything and ray_head.stop():
        ray_head.reap()
        print("the cluster that `teacher up` started is stopped")


def _scaling(found: "ServiceStatus") -> str:
    """How many replicas a service wants and, where it scales itself, between which bounds."""
    from teacher_service.service.scaling.policy import in_words

    if (scale := found.scale) is None:
        return ""
    bounds = f" ({in_words(scale.bounds)})" if scale.bounds else ""
    return f", {_replicas(scale.wanted)} wanted{bounds}; steps waited {scale.waiting:.0%} lately"


def _refuse_in_use(name: str, users: Sequence[str], *, force: bool) -> None:
    """Refuse to stop a service under who uses it, or say under whom. Raises ConfigError."""
    who = f"teacher service {name} is used by {', '.join(users)}"
    if not force:
        raise ConfigError(
            f"{who}; stop that first, with Ctrl-C or SIGTERM, or pass --force to stop the service "
            "under it"
        )
    print(f"{who}, which waits for it, or ends where it started it itself")


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number != 1 else ''}"
