"""Whether a cluster holds what a run asks for, said in seconds and never waited for in silence.

A bundle is what one process needs on one node, as Ray resources.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import PlacementError
from shared.in_words import counted
from teacher_service.service.replicas.naming import Role
from teacher_service.service.replicas.nodes import ADDED_S, ROLES, added, autoscales, declares

Bundle = dict[str, float]
Demand = tuple[str, Bundle]  # with whose it is, in words
PATIENCE_S = 8.0
ADVICE = (
    "ask for less (student.workers, teachers.NAME.replicas, rollouts.replicas, cpus, gpus) or add "
    "nodes"
)
ROLE_SHARE = 0.01  # of a role's resource: it says where, not how many


def teacher_bundle(teacher: Teacher, declared: Mapping[str, float]) -> Bundle:
    """What one process of a replica needs; the role counts where the cluster declares it."""
    return _bundle("teacher", teacher.rank_cpus, teacher.rank_gpus, declared)


def teachers_demands(
    teachers: Mapping[str, Teacher], declared: Mapping[str, float]
) -> list[Demand]:
    """What the replicas that all teachers begin with need, as `refuse_unplaceable` takes it."""
    whose = {name: f"the replicas of {name}" for name in teachers}
    if len(teachers) == 1:
        whose = dict.fromkeys(teachers, "the teacher's replicas")
    return [
        (whose[name], teacher_bundle(teacher, declared))
        for name, teacher in teachers.items()
        for _ in range(teacher.fewest * teacher.tensor_parallel)
    ]


def student_bundle(config: Config, declared: Mapping[str, float]) -> Bundle:
    """What one worker needs."""
    return _bundle("student", config.student.cpus, config.student.gpus, declared)


def declared() -> Mapping[str, float]:
    """What the cluster's nodes have, and the roles of those that may come."""
    roles = {role: 1.0 for role in ROLES if declares(role)}
    return {**roles, **ray.cluster_resources()}


def rollouts_role(declared: Mapping[str, float]) -> Role:
    """Whose place copies of the student that write take: their own where a node has it."""
    return "rollouts" if declared.get("rollouts") else "student"


def rollouts_demands(config: Config, declared: Mapping[str, float]) -> list[Demand]:
    """What the student's copies that write begin with; nothing where its workers write."""
    if not config.rollouts.serves:
        return []
    copies = config.rollouts.served(config.student)
    bundle = _bundle(rollouts_role(declared), copies.cpus, copies.gpus, declared)
    return [("the copies of the student that write", bundle)] * copies.fewest


def refuse_unplaceable(demands: Sequence[Demand]) -> None:
    """Check named bundles against every node, first all they have, then what is free. A cluster
    that adds nodes is asked for them, and they are waited for.

    Raises PlacementError naming what cannot be placed and what is missing, within 10 s where no
    nodes are added, and once its autoscaler has none to add.
    """
    if (refusal := _refusal(demands)) is None:
        return
    if not autoscales():
        raise PlacementError(f"{refusal}; {ADVICE}")
    print(
        f"{refusal}; its autoscaler is asked for nodes, which are waited for up to {ADDED_S:g} s",
        flush=True,
    )
    if why := added([bundle for _, bundle in demands], deadline_s=ADDED_S):
        raise PlacementError(f"{refusal}, and its autoscaler {why}; {ADVICE}")


def _refusal(demands: Sequence[Demand]) -> str | None:
    """Why bundles cannot be placed; None where there is room within PATIENCE_S."""
    total = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if misfit := _first_misfit(demands, total):
        return _sentence(misfit, demands, total, "has")
    deadline = time.monotonic() + PATIENCE_S
    while misfit := _first_misfit(demands, _free_per_node()):
        if time.monotonic() > deadline:
            return _sentence(misfit, demands, _free_per_node(), "has free")
        time.sleep(0.5)
    return None


def refuse_unplaceable_here(
    demands_of: Callable[[Mapping[str, float]], Sequence[Demand]],
) -> None:
    """Check named bundles, which depend on the resources that a cluster declares, against the
    cluster or, where one is still to be started, this machine. A cluster that adds nodes is asked
    when they are needed. Raises PlacementError."""
    if not ray.is_initialized():
        _refuse_beyond_machine(demands_of({}))
    elif not autoscales():
        refuse_unplaceable(demands_of(declared()))


def gpus_here() -> float:
    """GPUs of the cluster or, where one is still to be started, of this machine."""
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0.0)
    return _machine().get("GPU", 0.0)


def _machine() -> Bundle:
    """What Ray would declare of this machine."""
    found = ResourceAndLabelSpec()
    found.resolve(is_head=True)
    return {name: amount or 0.0 for name, amount in found.to_resource_dict().items()}


def _refuse_beyond_machine(demands: Sequence[Demand]) -> None:
    machine = [_machine()]
    if misfit := _first_misfit(demands, machine):
        raise PlacementError(f"{_sentence(misfit, demands, machine, 'has')}; {ADVICE}")


def room_for(bundle: Bundle, most: int, *, beside: Sequence[Demand] = ()) -> int:
    """How many copies of a bundle, up to `most`, find room at one time in what is free, beside
    other demands and the placement groups that wait for theirs."""
    free = _free_per_node()
    for waiting in (beside, *_waiting_groups()):
        _place(waiting, free)
    return next((n for n in range(most) if not _place([("", bundle)], free)), most)


def lost_nodes(nodes: Sequence[str], *, deadline_s: float = 60.0) -> dict[str, str]:
    """Those of some nodes that the cluster has lost, with their addresses. Returns once each has
    answered or is known to be gone, or at the deadline."""
    known = {node["NodeID"]: node for node in ray.nodes()}
    asked = [
        _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            "/"
        )
        for node in nodes
        if known[node]["Alive"]
    ]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=deadline_s)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {node: known[node]["NodeManagerAddress"] for node in nodes if node not in alive}


def refuse_unshared(folder: Path, *, option: str, deadline_s: float = 60.0) -> None:
    """With more than one node, prove by a probe file that all see the same folder."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_text("")
    try:
        seen = [
            _sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(probe))
            for node in nodes
        ]
        blind = [
            node["NodeManagerAddress"]
            for node, found in zip(nodes, ray.get(seen, timeout=deadline_s), strict=True)
            if not found
        ]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise PlacementError(
            f"{folder} is not the same folder on {', '.join(blind)}; set {option} to "
            "storage that every node mounts"
        )


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return Path(path).exists()


def _bundle(role: str, cpus: float, gpus: float, declared: Mapping[str, float]) -> Bundle:
    bundle = {"CPU": cpus, "GPU": gpus, role: ROLE_SHARE if declared.get(role) else 0.0}
    return {name: amount for name, amount in bundle.items() if amount}


def _free_per_node() -> list[Bundle]:
    # The public call sums over nodes, which hides that no single node may have room.
    return [dict(free) for free in available_resources_per_node().values()]


def _waiting_groups() -> list[list[Demand]]:
    """What placement groups ask for that wait for room, as those of a lost node do."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [
        [
            (group["name"], bundle)
            for number, bundle in group["bundles"].items()
            if group["bundles_to_node_id"][number] not in alive
        ]
        for group in placement_group_table().values()
        if group["state"] in ("PENDING", "RESCHEDULING")
    ]


def _first_misfit(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> Demand | None:
    """First fit, largest first; the bundle that found no node."""
    left = [dict(node) for node in nodes]
    for demand in sorted(demands, key=lambda d: -sum(d[1].values())):
        if not _place([demand], left):
            return demand
    return None


def _place(demands: Sequence[Demand], free: list[Bundle]) -> bool:
    """Take demands out of what nodes have free, all of them or none; whether they found room."""
    left = [dict(node) for node in free]
    for _, bundle in sorted(demands, key=lambda d: -sum(d[1].values())):
        host = next(
            (n for n in left if all(n.get(k, 0) >= v - 1e-6 for k, v in bundle.items())), None
        )
        if host is None:
            return False
        for resource, amount in bundle.items():
            host[resource] -= amount
    free[:] = left
    return True


def _sentence(
    misfit: Demand,
    demands: Sequence[Demand],
    nodes: Sequence[Mapping[str, float]],
    verb: str,
) -> str:
    name, bundle = misfit
    asked = {resource: sum(b.get(resource, 0) for _, b in demands) for resource in bundle}
    has = {resource: sum(n.get(resource, 0) for n in nodes) for resource in bundle}
    short = [r for r in bundle if has[r] < asked[r]] or list(bundle)  # else: no node has it alone
    amounts = ", ".join(f"{asked[r]:g} {r}" for r in short)
    there = ", ".join(f"{has[r]:g} {r}" for r in short)
    return (
        f"no room for {name}: all together ask for {amounts}, the cluster of "
        f"{counted(len(nodes), 'node')} {verb} {there}"
    )
