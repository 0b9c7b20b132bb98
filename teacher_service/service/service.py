"""Start, scale, look at and stop a teacher service.

A service is a registry and replicas in a Ray namespace of its name, each replica in a placement
group of its own. A detached service outlives its driver; another dies with it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import cloudpickle
from ray.util.placement_group import remove_placement_group

from shared.config.models.teachers import Autoscaling, Teacher
from shared.errors import ConfigError, TeacherError
from shared.targets.asks.head_location import ShippedHead
from teacher_service.engine.description import Engine, MakeEngine, TeacherDescription
from teacher_service.service.asking import ANSWER_S, answer, request_of, tell
from teacher_service.service.kept import forget_replicas
from teacher_service.service.registry import TeacherRegistry
from teacher_service.service.replicas.launching import disown, launch, own, remove
from teacher_service.service.replicas.naming import (
    REGISTRY,
    Request,
    Role,
    find_actor,
    index_of,
    is_part,
    lifetime_of,
    replica_name,
    replica_names,
)
from teacher_service.service.replicas.nodes import of_the_head
from teacher_service.service.replicas.placing import groups_of, place
from teacher_service.service.replicas.views import ReplicaView, ScaleView
from teacher_service.service.scaler import DRAIN_GRACE_S
from teacher_service.service.scaling.policy import Pace

HEAD_S = 600.0  # a head of some GB onto a shared disk, after the unit under way
END_S = 1.0
BY_HAND = "as asked for"
PACE = Pace()  # of services that scale themselves


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A service as far as it can be seen; a half-dead one has no registry."""

    service: str
    teacher: Teacher | None
    detached: bool
    replicas: tuple[ReplicaView, ...]
    scale: ScaleView | None


@dataclass(frozen=True, slots=True)
class Starting:
    """Replicas that are placed and load."""

    service: str
    names: tuple[str, ...]
    deadline_s: float
    undo: Callable[[], object] | None  # removes them again; None where they serve already

    def described(self) -> TeacherDescription:
        """Wait until they serve. Raises UserError for a teacher that cannot be loaded; nothing that
        was placed is left behind then."""
        try:
            description = _described(self.service, self.names, self.deadline_s)
            if self.undo is not None:
                answer(find_actor(self.service, REGISTRY).add.remote([*self.names]), "the registry")
        except BaseException:
            self.give_up()
            raise
        return description

    def give_up(self) -> None:
        """Remove what does not serve yet."""
        if self.undo is not None:
            self.undo()


def default_engine(teacher: Teacher, cache: str | None, context: int | None) -> Engine:
    """The engine a replica loads; imported there, so that a driver needs no torch."""
    if teacher.engine == "vllm":
        from teacher_service.service.replicas.environments import load_vllm

        return load_vllm(teacher, context=context)
    from teacher_service.engine.opening import open_engine

    return open_engine(teacher, cache=cache, context=context)


def start_all(
    teachers: Mapping[str, Teacher],
    *,
    detached: bool,
    cache: str | None,
    context: int | None = None,
) -> Iterator[tuple[str, TeacherDescription]]:
    """Bring up services by name, all at the same time, and give each as soon as it serves and those
    before it do.

    Raises what `start` and `Starting.described` raise; of what does not serve by then nothing is
    left behind.
    """
    waiting: list[Starting] = []
    try:
        for name, teacher in teachers.items():
            waiting.append(start(name, teacher, detached=detached, cache=cache, context=context))
        while waiting:
            starting = waiting.pop(0)
            yield starting.service, starting.described()
    finally:
        for starting in waiting:
            starting.give_up()


def start(
    service: str,
    teacher: Teacher,
    *,
    detached: bool,
    role: Role = "teacher",
    cache: str | None = None,
    context: int | None = None,
    make_engine: MakeEngine | None = None,
    runtime_env: dict[str, Any] | None = None,
    deadline_s: float = 1800.0,
) -> Starting:
    """Place `teacher.fewest` replicas, which load from then on.

    A service that already serves the same teacher under this name is left as it is. Raises
    ConfigError where it serves another, PlacementError within 10 s where replicas do not fit;
    nothing is left behind then. `role` "student" serves a student's model where the cluster has
    students' workers. `context` is the length of the longest rows that will be asked about.
    """
    if (request := request_of(service)) is not None:
        if not request.same_teacher(teacher):
            raise ConfigError(
                f"teacher service {service} already serves {request.teacher.model} with other "
                "settings; stop it with `tutelage teacher down`, or use another name"
            )
        if names := replica_names(service):
            return Starting(service, tuple(names), deadline_s, undo=None)
    stop(service)
    make_engine = make_engine or partial(default_engine, teacher, cache, context)
    request = Request(
        teacher=teacher,
        make_engine=cloudpickle.dumps(make_engine),  # type: ignore[attr-defined]
        runtime_env=runtime_env or {},
        detached=detached,
        job=ray.get_runtime_context().get_job_id(),
        pace=PACE,
        role=role,
    )
    try:
        own(service, _registry(service, request))
        names = _launched(service, request, range(teacher.fewest))
    except BaseException:
        stop(service)
        raise
    return Starting(service, names, deadline_s, undo=partial(stop, service))


def _registry(service: str, request: Request) -> Any:
    options = {
        "name": REGISTRY,
        "namespace": service,
        "lifetime": lifetime_of(request.detached),
        "resources": of_the_head(),
    }
    return TeacherRegistry.options(**options).remote(service, request)  # type: ignore[attr-defined]


def scale(service: str, replicas: int, *, deadline_s: float = 1800.0) -> int:
    """Grow or shrink a service to `replicas`, while clients work; returns the number before.

    Shrinking drains: a replica finishes what it was sent. Raises PlacementError within 10 s where
    the new ones do not fit; those that serve stay. Raises ConfigError for one that scales itself.
    """
    if replicas < 1:
        raise ConfigError(f"a service needs a replica, not {replicas}; use `tutelage teacher down`")
    request, names = _to_be_scaled(service), replica_names(service)
    if isinstance(bounds := request.teacher.replicas, Autoscaling):
        raise ConfigError(
            f"teacher service {service} scales itself, from {bounds.min} to {bounds.max} replicas; "
            f"`tutelage teacher up CONFIG teachers.NAME.replicas={replicas}` makes the number "
            "fixed, and with teachers.NAME.replicas.min or max the bounds are others"
        )
    if replicas < len(names):
        _want(service, replicas, BY_HAND)
        _drain(service, names[replicas:], deadline_s)
    elif replicas > len(names):
        first = index_of(names[-1]) + 1 if names else 0
        added = range(first, first + replicas - len(names))
        placed = _launched(service, request, added)
        _want(service, replicas, BY_HAND)
        same = (*names[:1], *placed)  # all must be the same teacher
        Starting(service, same, deadline_s, undo=partial(_shrink, service, placed)).described()
    return len(names)


def rescale(service: str, replicas: int | Autoscaling) -> None:
    """Let a running service scale itself by other bounds, or with a number not at all."""
    _to_be_scaled(service)
    answer(find_actor(service, REGISTRY).rescale.remote(replicas), "the registry")


def scaling_since(service: str, told: int) -> ScaleView | None:
    """How a service scales, with its lines after so many; None where it does not answer."""
    try:
        registry = find_actor(service, REGISTRY)
        return registry and answer(registry.scale_view.remote(told), "the registry")
    except TeacherError:
        return None


def status(service: str) -> ServiceStatus:
    """What the registry knows, or what is left where it is gone. Raises ConfigError if nothing."""
    request, names = request_of(service), replica_names(service)
    registry = find_actor(service, REGISTRY)
    if request is None or registry is None:
        if service not in list_services():
            raise ConfigError(f"no teacher service named {service} is running")
        down = tuple(ReplicaView(name, "down") for name in names)
        return ServiceStatus(service, None, False, down, None)
    view = answer(registry.view.remote(), "the registry")
    scale = answer(registry.scale_view.remote(), "the registry")
    return ServiceStatus(service, request.teacher, request.detached, view.replicas, scale)


def running(service: str, *, deadline_s: float = ANSWER_S) -> Starting:
    """The replicas of a running service. Raises ConfigError if it has none."""
    return Starting(service, _running(service), deadline_s, undo=None)


def ship_head(service: str, *, deadline_s: float = HEAD_S) -> ShippedHead:
    """Let a replica of a running service keep its head in the service's cache.

    Raises ConfigError for a teacher whose head cannot be shipped.
    """
    first = _running(service)[0]
    call = find_actor(service, first).ship_head.remote()
    return answer(call, f"{first} of teacher service {service}", deadline_s)


def use(service: str, user: str) -> bool:
    """Tell a service that a command uses it; whether it is there. Call it again and again."""
    return tell(service, "use", user)


def leave(service: str, user: str) -> None:
    """Tell a service that a command uses it no longer."""
    tell(service, "leave", user)


def users(service: str) -> list[str]:
    """The commands that use a service."""
    registry = find_actor(service, REGISTRY)
    try:
        return [] if registry is None else answer(registry.users.remote(), "the registry")
    except TeacherError:
        return []  # it is half dead, and so are its clients


def stop(service: str) -> bool:
    """Remove actors and placement groups, also of a half-dead service; whether any were there."""
    if (registry := find_actor(service, REGISTRY)) is not None:
        ray.wait([registry.end.remote()], timeout=END_S)  # one that is half dead tells nobody
        ray.kill(registry, no_restart=True)  # first, since it may make replicas
    names, groups = replica_names(service), groups_of(service)
    remove(service, names)
    disown(service)
    forget_replicas(service)
    for group in groups.values():
        remove_placement_group(group.handle)
    deadline = time.monotonic() + ANSWER_S
    while service in _namespaces() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(registry or names or groups)


def list_services() -> list[str]:
    """Services of which anything is left in the cluster: actors or placement groups."""
    return sorted(_namespaces() | {name.split(":")[1] for name in groups_of()})


def _running(service: str) -> tuple[str, ...]:
    if names := replica_names(service):
        return tuple(names)
    raise ConfigError(f"no teacher service named {service} is running")


def _launched(service: str, request: Request, indices: Iterable[int]) -> tuple[str, ...]:
    """Place further replicas and give their names; what this call created is removed again on
    failure."""
    names = [replica_name(service, index) for index in indices]
    try:
        groups = place(service, names, request)
        for name, group in zip(names, groups, strict=True):
            launch(service, name, group, request)
    except BaseException:
        remove(service, names)
        raise
    return tuple(names)


def _described(service: str, names: Iterable[str], deadline_s: float) -> TeacherDescription:
    """Wait until all replicas have loaded. Raises what loading raised."""
    waiting = {find_actor(service, name).describe.remote(): name for name in names}
    deadline = time.monotonic() + deadline_s
    descriptions: list[TeacherDescription] = []
    while waiting:
        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        if not ready:
            raise TeacherError(
                f"{len(waiting)} replicas of teacher service {service} were not loaded within "
                f"{deadline_s:g} s; see their logs, or allow more time"
            )
        descriptions.append(answer(ready[0], waiting.pop(ready[0])))
    if any(d.fingerprint != descriptions[0].fingerprint for d in descriptions):
        raise TeacherError(
            f"the replicas of teacher service {service} are not the same teacher: their nodes "
            "differ in device, threads or library versions; use one kind of node"
        )
    return descriptions[0]


def _drain(service: str, names: list[str], deadline_s: float) -> None:
    """Take replicas off the list, let them finish, then remove them."""
    registry = find_actor(service, REGISTRY)
    answer(registry.drain.remote(names), "the registry")
    time.sleep(DRAIN_GRACE_S)
    flushes = [actor.flush.remote() for name in names if (actor := find_actor(service, name))]
    ray.wait(flushes, num_returns=len(flushes), timeout=deadline_s)
    remove(service, names)
    answer(registry.forget.remote(names), "the registry")


def _want(service: str, replicas: int, why: str) -> None:
    answer(find_actor(service, REGISTRY).want.remote(replicas, why), "the registry")


def _shrink(service: str, names: Iterable[str]) -> None:
    remove(service, names)
    _want(service, len(replica_names(service)), "since the others did not come to serve")


def _to_be_scaled(service: str) -> Request:
    """What a service was started with. Raises ConfigError where it cannot be scaled from here."""
    if (request := request_of(service)) is None:
        raise ConfigError(f"no teacher service named {service} is running; see `tutelage status`")
    if not request.detached and request.job != ray.get_runtime_context().get_job_id():
        raise ConfigError(
            f"teacher service {service} belongs to a run; only services of `tutelage teacher up` "
            "can be scaled from outside"
        )
    return request


def _namespaces() -> set[str]:
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    ours = (actor for actor in named if actor["name"] == REGISTRY or is_part(actor))
    return {actor["namespace"] for actor in ours}
