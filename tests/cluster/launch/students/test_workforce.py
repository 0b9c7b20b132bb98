"""A training has the workers that a cluster has room for, says so, and asks them to become more."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.launch.students import workforce
from cluster.launch.students.elastic import Pace
from cluster.launch.students.workforce import Workforce
from cluster.session.placement import room_for
from shared.run.run_dir import RunDir
from tests.cluster.session.test_placement import ALL_CPUS

ONE = {"CPU": ALL_CPUS / 4}
Hold = Callable[[int], None]


@pytest.fixture
def files(tmp_path: Path) -> RunDir:
    """A run whose rank 0 takes steps."""
    found = RunDir(tmp_path)
    found.logs.mkdir()
    found.stepping.touch()
    return found


@pytest.fixture
def hold(ray_cluster, monkeypatch) -> Iterator[Hold]:
    """Others hold the places of so many workers of the cluster's four, from now on."""
    monkeypatch.setattr(workforce, "PACE", Pace(look_s=0.0, steady_s=0.0, settle_s=0.0))
    monkeypatch.setattr(workforce, "BEGIN_S", 0.1)
    groups: list = []

    def held(places: int) -> None:
        while groups:
            remove_placement_group(groups.pop())
        if places:
            groups.append(placement_group([ONE] * places))
            ray.get(groups[0].ready(), timeout=60)
        deadline = time.monotonic() + 30
        while room_for(ONE, 4) != 4 - places and time.monotonic() < deadline:
            time.sleep(0.05)  # what was let go is free a moment later

    held(0)
    yield held
    held(0)


@pytest.mark.parametrize(("held", "number"), [(0, 4), (1, 2), (2, 2), (3, 1)])
def test_the_most_that_find_room_are_chosen(hold, files, held, number):
    hold(held)
    assert Workforce((1, 2, 4), ONE, files).choose() == number


def test_teachers_that_come_later_keep_their_places(hold, files):
    force = Workforce((1, 2, 4), ONE, files)
    force.begin([("the teacher's replicas", ONE)])
    assert force.choose() == 2


def test_a_fixed_number_is_taken_and_waited_for_in_words(hold, files, capsys, monkeypatch):
    monkeypatch.setattr(workforce, "SETTLING_S", 0.1)
    force = Workforce((3,), ONE, files)
    hold(2)
    assert force.choose() == 3
    force.up(["a", "a", "b"])
    assert capsys.readouterr().out == ""
    force.down()
    assert [force.choose(), force.choose()] == [3, 3]
    said = "no room for 3 student workers; training goes on once there is\n"
    assert capsys.readouterr().out == said


def test_workers_are_asked_to_become_more_while_there_is_room(hold, files, capsys):
    hold(4)
    force = Workforce((1, 2, 4), ONE, files)
    force.begin([])
    force.up(["a"])
    told = {"fewest": 1, "wanted": 4, "present": 1}
    assert json.loads(files.workers.read_text()) == told
    force.look()
    assert not files.growth_request.exists()
    hold(3)
    force.look()
    assert files.growth_request.exists()
    hold(4)
    force.look()
    assert not files.growth_request.exists()
    hold(0)
    force.look()
    assert files.growth_request.exists()
    force.down()
    assert force.choose() == 4
    force.up(["a", "a", "b", "b"])
    force.look()
    assert capsys.readouterr().out.splitlines() == [
        "student: 1 worker, from 1 to 4",
        "there is room for 2 workers, who go on from the next checkpoint",
        "there is room for 4 workers, who go on from the next checkpoint",
        "student: 1 -> 4 workers, from 1 to 4",
    ]


def test_nobody_is_asked_who_takes_no_steps(hold, files):
    force = Workforce((1, 2), ONE, files)
    force.up(["a"])
    files.stepping.unlink()
    force.look()
    assert not files.growth_request.exists()
