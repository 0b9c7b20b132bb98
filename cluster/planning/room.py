"""Whether the cluster has room for the processes of a run, asked before they start."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.planning.preparation import Launch
from shared.config.run import Config
from shared.locations import Location

if TYPE_CHECKING:
    from cluster.session.placement import Demand


def refuse_unplaceable(launch: Launch) -> None:
    """Refuse what the cluster has no room for, before anything is asked of it."""
    from cluster.session import placement

    config = launch.config
    placement.refuse_unplaceable(_demands(config, launch.services, placement.declared()))
    placement.refuse_unshared(launch.run_dir.path, option="paths.runs")
    placement.refuse_unshared(Path(config.paths.cache), option="paths.cache")
    store = config.targets.store and Location.of(config.targets.store).local
    if store:
        placement.refuse_unshared(store, option="targets.store")


def refuse_unplaceable_early(config: Config, services: Mapping[str, str] | None) -> None:
    """The same before anything is prepared, on the cluster that is there or else this machine."""
    from cluster.session import placement

    placement.refuse_unplaceable_here(partial(_demands, config, services))


def beside_students(
    config: Config, services: Mapping[str, str] | None, declared: Mapping[str, float]
) -> list["Demand"]:
    """What the run's own teachers need, unless they run already or none is asked, and copies of
    the student that write."""
    from cluster.session import placement

    copies = placement.rollouts_demands(config, declared)
    if services is not None or config.targets.teacher_free:
        return copies
    return placement.teachers_demands(config.teachers, declared) + copies


def _demands(
    config: Config, services: Mapping[str, str] | None, declared: Mapping[str, float]
) -> list["Demand"]:
    """What all processes of a run need."""
    from cluster.session import placement

    bundle = placement.student_bundle(config, declared)
    students: list[Demand] = [("the student's workers", bundle)] * config.fewest_workers
    return students + beside_students(config, services, declared)
