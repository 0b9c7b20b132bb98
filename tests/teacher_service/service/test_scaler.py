"""Services that scale themselves, on a real cluster with slowed teachers."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from uuid import uuid4

import pytest
import ray

from cluster.cli import main
from cluster.commands import status
from shared.config.models.teachers import Autoscaling, Teacher
from shared.store.readers import RecordingReader
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from teacher_service.service.replicas.naming import REGISTRY
from teacher_service.service.scaling.policy import Pace
from tests.answers import question_of
from tests.teacher_service.scripted import Scripted, invented, is_first, make_rows

SPEC = question_of(top_k=4, shared_vocab=100)
QUICK = Pace(grow_s=3.0, shrink_s=4.0, place_s=4.0, start_s=60.0, retry_s=3.0, retry_most_s=6.0)
SLOW = Scripted(delay_s=0.3)


@pytest.fixture
def name(ray_cluster, monkeypatch) -> Iterator[str]:
    """A service name of its own, stopped afterwards; its decisions take seconds."""
    monkeypatch.setattr(service, "PACE", QUICK)
    name = f"service-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def teacher(**replicas: float) -> Teacher:
    return Teacher(model="any", cpus=0.1, replicas=Autoscaling(**replicas))  # type: ignore[arg-type]


def wait_until(
    condition: Callable[[], bool], *, seconds: float = 60.0, told: Callable[[], object] = tuple
) -> None:
    """`told` is what a failure shows."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def states(name: str) -> list[str]:
    return [replica.state for replica in service.status(name).replicas]


def lines(name: str) -> tuple[str, ...]:
    view = service.scaling_since(name, 0)
    assert view is not None
    return view.lines


def groups(name: str) -> int:
    table = ray.util.placement_group_table().values()
    return sum(name in g["name"] and g["state"] != "REMOVED" for g in table)


@contextmanager
def learning(name: str, *, learn_s: float = 0.05) -> Iterator[list]:
    """A client that learns as a trainer does, and whose answers are right."""
    ended, answers = threading.Event(), []
    pool = open_pool(0, service=name, run="runs/one", in_flight=4, unit_deadline_s=120.0)

    def learn() -> None:
        units = [make_rows([[10]], first=index, seed=index) for index in range(5)]
        for unit in units[:4]:
            pool.submit(unit, SPEC)
        while not ended.is_set():
            pool.submit(units[(len(answers) + 4) % 5], SPEC)
            answers.append(pool.next())
            wanted = invented(units[(len(answers) - 1) % 5], SPEC)
            assert answers[-1].table.equals(wanted.table)
            time.sleep(learn_s)

    thread = threading.Thread(target=learn)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()
        assert pool.stats.units == len(answers)
        pool.close()


@pytest.mark.drill
def test_a_service_grows_under_waits_and_shrinks_when_idle(name):
    service.start(name, teacher(max=3, wait=0.1), detached=True, make_engine=SLOW).described()
    with learning(name) as answers:
        wait_until(lambda: states(name).count("alive") == 3, told=lambda: lines(name))
        assert service.status(name).scale.wanted == 3  # type: ignore[union-attr]
        before = len(answers)
        wait_until(lambda: len(answers) > before + 20)
    assert all("steps waited" in line and "above 10 %" in line for line in lines(name))
    assert [line[:18] for line in lines(name)] == ["1 -> 2 replicas, s", "2 -> 3 replicas, s"]
    wait_until(lambda: states(name) == ["alive"])
    wait_until(lambda: groups(name) == 1)
    assert lines(name)[-1] == "3 -> 1 replica, nothing was asked of it for 4 s"
    assert service.status(name).scale.wanted == 1  # type: ignore[union-attr]


@pytest.mark.drill
def test_behind_a_store_that_has_the_answers_a_service_shrinks_to_its_fewest(name, tmp_path):
    described = service.start(
        name, teacher(min=2, max=3), detached=True, make_engine=SLOW
    ).described()
    pool = open_pool(0, service=name, run="runs/one", in_flight=4)
    reader = RecordingReader(pool, tmp_path, teacher=described.fingerprint)
    units = [make_rows([[10]], first=index, seed=index) for index in range(5)]

    def learn() -> bool:
        for unit in units:
            reader.submit(unit, SPEC)
            assert reader.next().table.equals(invented(unit, SPEC).table)
        return states(name) == ["alive"]

    assert not learn()
    service.rescale(name, Autoscaling(min=1, max=3))
    wait_until(learn, told=lambda: lines(name))
    assert lines(name)[-1] == "2 -> 1 replica, nothing was asked of it for 4 s"
    reader.close()


@pytest.mark.drill
def test_a_place_that_never_comes_is_given_up_and_by_hand_a_number_is_refused(name, capsys):
    wide = teacher(max=2).model_copy(update={"cpus": 5.0})
    service.start(name, wide, detached=True, make_engine=SLOW).described()
    with learning(name):
        wait_until(lambda: groups(name) == 2)
        wait_until(lambda: any("is given up" in line for line in lines(name)))
        assert states(name) == ["alive"]
        assert "replica-1 found no room within 4 s and is given up; the next try" in lines(name)[1]
        wait_until(lambda: len(lines(name)) > 3)
    assert main(["teacher", "scale", "2", "--service", name]) == 2
    said = capsys.readouterr().err
    assert f"{name} scales itself, from 1 to 2 replicas; `tutelage teacher up CONFIG" in said
    assert main(["teacher", "status", "--service", name]) == 0
    said = capsys.readouterr().out
    assert "wanted (from 1 to 2 replicas, more where steps wait above 3 % of their time)" in said
    status._say_services(reap=False)
    assert f"{name}: any, 1 of " in (said := capsys.readouterr().out)
    assert "serve, from 1 to 2" in said
    wait_until(lambda: groups(name) == 1)
    assert service.stop(name)
    assert groups(name) == 0


def test_bounds_and_numbers_take_turns(name):
    service.start(name, teacher(min=2, max=3), detached=True, make_engine=SLOW).described()
    assert states(name) == ["alive"] * 2
    service.rescale(name, Autoscaling(min=3, max=4))
    wait_until(lambda: states(name) == ["alive"] * 3)
    service.rescale(name, 3)
    assert service.scale(name, 1) == 3
    assert states(name) == ["alive"]
    time.sleep(2 * QUICK.retry_s)
    assert states(name) == ["alive"], "a number that is fixed stays"
    assert [line.partition(",")[0] for line in lines(name)] == [
        "from 3 to 4 replicas",
        "a number that is fixed",
        "3 -> 1 replica",
    ]


@pytest.mark.drill
def test_a_registry_that_is_started_again_knows_the_bounds_it_was_given(name):
    def restarted() -> service.ServiceStatus:
        def anew() -> bool:  # the one before may still answer, and it has said something
            view = service.scaling_since(name, 0)
            return view is not None and not view.lines

        assert lines(name)
        ray.kill(ray.get_actor(REGISTRY, namespace=name), no_restart=False)
        wait_until(anew)
        return service.status(name)

    service.start(name, teacher(max=2), detached=True, make_engine=SLOW).described()
    service.rescale(name, Autoscaling(min=2, max=3, wait=0.5))
    wait_until(lambda: states(name) == ["alive"] * 2)
    found = restarted()
    assert found.scale is not None
    assert found.scale.bounds == Autoscaling(min=2, max=3, wait=0.5)
    wait_until(lambda: states(name) == ["alive"] * 2)
    service.rescale(name, 2)
    found = restarted()
    assert found.scale is not None
    assert found.scale.bounds is None
    service.stop(name)
    service.start(name, teacher(max=4), detached=True, make_engine=SLOW).described()
    view = service.scaling_since(name, 0)
    assert view is not None
    assert view.bounds == Autoscaling(max=4), "what another service of the name was given is gone"


@dataclass(frozen=True)
class Differing(Scripted):
    """Another teacher in every process but the first."""

    seen: str = ""

    def describe(self):
        model = "scripted" if is_first(self.seen) else "another"
        return replace(super().describe(), fingerprint={"model": model})


def test_a_replica_that_is_another_teacher_never_serves(name, tmp_path):
    make = Differing(delay_s=0.3, seen=str(tmp_path / "seen"))
    service.start(name, teacher(max=2), detached=True, make_engine=make).described()
    with learning(name):
        wait_until(lambda: any("is given up" in line for line in lines(name)))
        assert "it is not the same teacher as the others" in lines(name)[1]
        assert states(name) == ["alive"]


@pytest.mark.drill
def test_a_replica_that_dies_comes_back_and_no_other_takes_its_place(name):
    service.start(
        name, teacher(min=2, max=3, wait=0.9), detached=True, make_engine=SLOW
    ).described()
    first = service.status(name).replicas[0]
    assert first.health is not None
    with learning(name):
        os.kill(first.health.pid, signal.SIGKILL)
        wait_until(lambda: service.status(name).replicas[0].restarts == 1)
        wait_until(lambda: states(name) == ["alive"] * 2)
    assert not lines(name)
