"""What does not fit is said in seconds, naming what is missing."""

import json
import threading
import time

import pytest
import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.core.generated import autoscaler_pb2 as messages
from ray.exceptions import RpcError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.session import placement
from cluster.session.placement import (
    refuse_unplaceable,
    refuse_unshared,
    room_for,
    student_bundle,
    teacher_bundle,
    teachers_demands,
)
from shared.config.file import load_config
from shared.config.models.teachers import Teacher
from shared.errors import PlacementError
from teacher_service.service.replicas import nodes
from teacher_service.service.replicas.nodes import Awaited, Outlook, autoscales, second_generation
from tests.cluster.jobs import write_job

ALL_CPUS = 8  # of the cluster of the tests


def test_what_fits_is_let_through(ray_cluster):
    refuse_unplaceable([("students", {"CPU": 1.0})] * 4)


def test_more_than_the_cluster_has_is_refused_at_once(ray_cluster):
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"no room for students: .* ask for 9 CPU, .* has 8"):
        refuse_unplaceable([("students", {"CPU": 1.0})] * (ALL_CPUS + 1))
    assert time.monotonic() - started < 5


def test_a_resource_no_node_has_is_named(ray_cluster):
    with pytest.raises(PlacementError, match=r"2 GPU, the cluster of 1 node has 0 GPU"):
        refuse_unplaceable([("teachers", {"CPU": 1.0, "GPU": 2.0})])


def test_room_is_what_is_free_beside_what_others_hold_and_ask_for(ray_cluster):
    one = {"CPU": 1.0}
    deadline = time.monotonic() + 30
    while (free := room_for(one, 99)) < ALL_CPUS and time.monotonic() < deadline:
        time.sleep(0.1)  # of tests before
    assert free == ALL_CPUS
    assert room_for(one, 3) == 3
    assert room_for(one, 99, beside=[("teachers", {"CPU": 2.5})] * 2) == 3
    assert room_for(one, 99, beside=[("more than there is", {"CPU": 9.0})]) == ALL_CPUS
    assert room_for({"GPU": 1.0}, 4) == 0
    held = placement_group([{"CPU": 3.0}] * 2)
    ray.get(held.ready(), timeout=60)
    waits = placement_group([{"CPU": 2.0}] * 2)
    try:
        assert room_for(one, 99) == 2  # which the other cannot take
    finally:
        for group in (held, waits):
            remove_placement_group(group)


def test_what_others_hold_is_waited_for_a_moment_and_then_refused(ray_cluster, monkeypatch):
    monkeypatch.setattr(placement, "PATIENCE_S", 2.0)

    @ray.remote(num_cpus=ALL_CPUS - 1)
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote(), timeout=60)
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"has free"):
        refuse_unplaceable([("students", {"CPU": 1.0})] * ALL_CPUS)
    assert 2 <= time.monotonic() - started < 20
    ray.kill(holder)


@pytest.fixture
def told_to_autoscale(ray_cluster, monkeypatch):
    """Lets the cluster say what one says whose autoscaler may add nodes of two types."""
    say({"active_nodes": {"head": 1, "node_of_teachers": 0}})
    monkeypatch.setattr(placement, "PATIENCE_S", 0.5)
    yield
    _internal_kv_del(DEBUG_AUTOSCALING_STATUS)


def say(report: dict, **beside: object) -> None:
    """What the first generation's monitor would, after a look."""
    told = json.dumps({"autoscaler_report": report, "time": time.time(), **beside})
    _internal_kv_put(DEBUG_AUTOSCALING_STATUS, told.encode(), overwrite=True)


def test_a_cluster_that_only_looks_adds_no_nodes(ray_cluster):
    (node,) = ray.nodes()
    assert not autoscales()
    say({"active_nodes": {f"node_{node['NodeID']}": 1}})
    assert not autoscales()
    say({"active_nodes": {f"node_{node['NodeID']}": 1, "node_of_a_user": 1}})
    assert autoscales()
    _internal_kv_del(DEBUG_AUTOSCALING_STATUS)
    assert not autoscales()


ASKED = {"pg_demand": [[{"bundles": [[{"GPU": 2.0}, 1]]}, 1]]}
ON_THE_WAY = (
    {"pending_nodes": [["10.0.0.2", "teacher", "waiting-for-ssh"]]},
    {"pending_launches": {"teacher": 1}},
    {"node_availability_summary": {"node_availabilities": {"teacher": {"is_available": False}}}},
)


def test_a_demand_that_no_type_of_node_meets_is_refused_at_once(told_to_autoscale, monkeypatch):
    monkeypatch.setattr(nodes, "STUCK_S", 2.0)
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.3):
            say({"active_nodes": {"head": 1}, "pending_nodes": []}, load_metrics_report=ASKED)

    looking = threading.Thread(target=look)
    looking.start()
    started = time.monotonic()
    try:
        with pytest.raises(PlacementError, match=r"2 GPU.* autoscaler adds no node for it"):
            refuse_unplaceable([("teachers", {"CPU": 1.0, "GPU": 2.0})])
    finally:
        stop.set()
        looking.join()
    assert time.monotonic() - started < 60  # of 900


@pytest.mark.parametrize("coming", ON_THE_WAY)
def test_nodes_on_their_way_are_waited_for(told_to_autoscale, monkeypatch, coming):
    monkeypatch.setattr(nodes, "STUCK_S", 0.0)
    outlook = Outlook()
    say({"active_nodes": {"head": 1}, **coming}, load_metrics_report=ASKED)
    outlook.follow()
    assert not outlook.hopeless
    say({"active_nodes": {"head": 1}}, load_metrics_report={"pg_demand": []})
    outlook.follow()
    assert not outlook.hopeless
    say({"active_nodes": {"head": 1}}, load_metrics_report=ASKED)
    outlook.follow()
    assert outlook.hopeless


def test_an_autoscaler_that_no_longer_looks_says_nothing(told_to_autoscale, monkeypatch):
    monkeypatch.setattr(nodes, "STUCK_S", 0.2)
    outlook = Outlook()
    say({"active_nodes": {"head": 1}}, load_metrics_report=ASKED)
    for _ in range(3):
        outlook.follow()
        time.sleep(0.2)
    assert not outlook.hopeless


def test_the_second_generations_autoscaler_says_what_it_cannot_add():
    """Its reply to a group without a place, and while a node is being started."""
    told = messages.GetClusterStatusReply()
    told.cluster_resource_state.node_states.add(ray_node_type_name="headgroup")
    told.cluster_resource_state.node_states.add()  # that only looks
    state = told.autoscaling_state
    state.last_seen_cluster_resource_state_version = 7
    assert second_generation(told) == (7, {"headgroup"}, False)
    state.infeasible_gang_resource_requests.add(details="one:PACK|PENDING")
    assert second_generation(told) == (7, {"headgroup"}, True)
    state.pending_instance_requests.add(ray_node_type_name="teacher")
    assert second_generation(told) == (7, {"headgroup"}, False)


def test_a_head_that_does_not_say_what_its_autoscaler_sees_adds_no_nodes(ray_cluster, monkeypatch):
    class Silent:
        def __init__(self, address: str) -> None: ...

        def get_cluster_status(self, timeout_s: float) -> bytes:
            raise RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr(nodes, "is_autoscaler_v2", lambda: True)
    monkeypatch.setattr("ray._raylet.GcsClient", Silent)
    assert not autoscales()
    outlook = Outlook()
    outlook.follow()
    assert not outlook.hopeless


def test_nodes_that_may_come_are_waited_for_with_a_line(told_to_autoscale, capsys):
    held = placement_group([{"CPU": ALL_CPUS - 1.0}])
    ray.get(held.ready(), timeout=60)
    threading.Timer(3.0, remove_placement_group, [held]).start()
    refuse_unplaceable([("students", {"CPU": 1.0})] * ALL_CPUS)
    said = capsys.readouterr().out
    assert said.startswith("no room for students: all together ask for 8 CPU")
    assert "its autoscaler is asked for nodes, which are waited for up to 900 s" in said


def test_nodes_that_never_come_are_a_refusal_at_a_deadline(told_to_autoscale, monkeypatch):
    monkeypatch.setattr(placement, "ADDED_S", 1.0)
    with pytest.raises(PlacementError, match=r"2 GPU.* added no nodes for it within 1 s; ask for"):
        refuse_unplaceable([("teachers", {"CPU": 1.0, "GPU": 2.0})])
    pending = [g for g in placement_group_table().values() if g["state"] == "PENDING"]
    assert pending == []


def test_places_that_are_awaited_are_counted_and_left_to_others(told_to_autoscale):
    awaited = Awaited({"CPU": 3.0})
    awaited.ask(4)  # of which 8 CPUs hold two
    deadline = time.monotonic() + 30
    while awaited.placed() < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert awaited.placed() == 2
    awaited.release()
    assert awaited.placed() == 0
    while (room := room_for({"CPU": 3.0}, 9)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert room == 2


def test_nothing_is_awaited_where_no_node_can_come(ray_cluster):
    awaited = Awaited({"CPU": 1.0})
    awaited.ask(2)
    assert awaited.placed() == 0


def test_roles_count_where_the_cluster_declares_them(tmp_path, tiny_pair):
    config = load_config(write_job(tmp_path, tiny_pair))
    assert student_bundle(config, {}) == {"CPU": 0.5}
    assert student_bundle(config, {"student": 4}) == {"CPU": 0.5, "student": 0.01}


def test_one_node_needs_no_shared_folder(ray_cluster, tmp_path):
    refuse_unshared(tmp_path, option="paths.runs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("declared", [{}, {"student": 4.0}])
def test_a_worker_asks_for_what_its_config_says(tmp_path, tiny_pair, declared):
    job = write_job(tmp_path, tiny_pair)
    config = load_config(job, ["student.cpus=2.5", "student.gpus=0.5"])
    role = {"student": 0.01} if declared else {}
    assert student_bundle(config, declared) == {"CPU": 2.5, "GPU": 0.5, **role}


@pytest.mark.parametrize("declared", [{}, {"teacher": 4.0}])
def test_a_replica_asks_for_what_its_config_says(declared):
    teacher = Teacher(model="any", cpus=2.5, gpus=0.5)
    role = {"teacher": 0.01} if declared else {}
    assert teacher_bundle(teacher, declared) == {"CPU": 2.5, "GPU": 0.5, **role}
    spread = Teacher(model="any", cpus=6, gpus=4, tensor_parallel=4, replicas=2)
    bundles = [bundle for _, bundle in teachers_demands({"one": spread}, declared)]
    assert bundles == [{"CPU": 1.5, "GPU": 1.0, **role}] * 8


def test_the_large_are_placed_first(monkeypatch):
    """On nodes of 2 and 1 CPUs, which this machine has not: the small one leaves room."""
    nodes = {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}}
    alive = [{"Alive": True, "Resources": resources} for resources in nodes.values()]
    monkeypatch.setattr("cluster.session.placement.ray.nodes", lambda: alive)
    monkeypatch.setattr("cluster.session.placement.available_resources_per_node", lambda: nodes)
    refuse_unplaceable([("small", {"CPU": 1.0}), ("large", {"CPU": 2.0})])
    with pytest.raises(PlacementError, match=r"no room for other: .* ask for 4 CPU, .* has 3 CPU"):
        refuse_unplaceable([("large", {"CPU": 2.0}), *[("other", {"CPU": 1.0})] * 2])
