"""Replicas as actors: made in their placement groups, and removed with them."""

import logging
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from teacher_service.service.replicas.actor import TeacherReplica
from teacher_service.service.replicas.naming import Request, find_actor
from teacher_service.service.replicas.placing import group_name, groups_of

# An actor that is not detached ends with its last owning handle, so who makes it keeps them.
_OWNED: dict[str, list[Any]] = {}


def launch(service: str, name: str, group: PlacementGroup, request: Request) -> Any:
    """Make a replica, which loads as soon as its group has a place, and makes its further ranks."""
    # It warns that a restart needs the group; the group lives as long as the actor.
    logging.getLogger("ray.actor").setLevel(logging.ERROR)
    replica = TeacherReplica.options(  # type: ignore[attr-defined]
        **request.actor_options(service, name),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    ).remote(
        request.make_engine,
        request.teacher.rank_cpus,
        request if request.teacher.tensor_parallel > 1 else None,
    )
    own(service, replica)
    return replica


def own(service: str, actor: Any) -> None:
    """Keep an actor of a service until it is disowned."""
    _OWNED.setdefault(service, []).append(actor)


def disown(service: str) -> None:
    """Let a service's actors end."""
    _OWNED.pop(service, None)


def remove(service: str, names: Iterable[str]) -> None:
    """Remove replicas at once, with their places, also those that have none yet."""
    names = list(names)
    groups = groups_of(service)
    for name in names:
        if (actor := find_actor(service, name)) is not None:
            ray.kill(actor, no_restart=True)
        if (group := groups.get(group_name(service, name))) is not None:
            remove_placement_group(group.handle)
