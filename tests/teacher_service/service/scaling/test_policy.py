"""The policy of scaling, driven through a day of a simulated service."""

import math
from collections.abc import Sequence
from itertools import pairwise, product

import pytest

from shared.config.models.teachers import Autoscaling
from teacher_service.service.scaling.demand import Counter, Demand, Report
from teacher_service.service.scaling.policy import (
    EASED,
    FULL,
    Memory,
    Observation,
    Pace,
    Replica,
    State,
    decide,
)
from tests.teacher_service.service.scaling.simulated import Client, Simulation, Timed
from tests.telling import telling

PACE = Pace()
LEARN_S = 0.2
SETTLED_S = 400.0  # within which a load that stays has the number that it keeps


def clients(work: float | Timed, *, ranks: int = 2, **options) -> list[Client]:
    """Ranks that together need so many replicas to keep pace."""
    needed = work if callable(work) else lambda now: work
    return [
        Client(lambda now: LEARN_S, lambda now: LEARN_S * needed(now) / ranks, **options)
        for _ in range(ranks)
    ]


def reversals(numbers: Sequence[int]) -> int:
    """How often a series turns round."""
    steps = [b - a for a, b in pairwise(numbers)]
    return sum(a * b < 0 for a, b in pairwise(steps))


@pytest.mark.parametrize(
    ("ranks", "work"),
    telling(product([1, 4], [0.3, 0.9, 1.5, 2.5, 4.2, 6.6]), (1, 4.2), (4, 0.9)),
)
def test_a_load_that_stays_makes_a_number_that_stays(work, ranks):
    bounds = Autoscaling(min=1, max=12, wait=0.05)
    done = Simulation(bounds, clients(work, ranks=ranks, in_flight=12)).run(3600)
    assert math.ceil(work) <= done.wanted <= math.ceil(work / FULL) + 1
    assert done.waiting() <= bounds.wait
    assert not done.changes(start=SETTLED_S)
    assert not reversals([1, *done.changes()])


def test_fewer_than_wanted_are_served_by_no_more_than_the_most():
    done = Simulation(Autoscaling(min=1, max=3), clients(9.0)).run(1200)
    assert done.changes() == [2, 3]
    assert done.lines[0][1] == "1 -> 2 replicas, steps waited 90 % of their time for it, above 3 %"


def test_steps_up_and_down_are_followed_without_turning_round():
    def work(now: float) -> float:
        return 5.0 if 1000 <= now < 3000 else 0.8

    day = Simulation(Autoscaling(max=8, wait=0.05), clients(work))
    assert day.run(1000).changes() == []
    day.run(600)
    assert day.wanted in (5, 6, 7, 8)
    assert day.changes(start=1000) == sorted(day.changes(start=1000))
    assert day.changes(start=1000 + SETTLED_S) == []
    day.run(3000)
    down = day.changes(start=3000)
    assert down == sorted(down, reverse=True)
    assert day.wanted <= 2
    assert len(down) <= 2


def test_a_ramp_is_followed_up_and_down():
    def work(now: float) -> float:
        return 0.5 + 5.5 * max(0.0, 1 - abs(now - 3000) / 3000)

    day = Simulation(Autoscaling(max=10, wait=0.05), clients(work)).run(6000)
    assert reversals(day.changes()) == 1
    assert max(day.changes()) >= 6
    day.run(600)
    assert day.wanted <= 2


def test_a_service_that_nobody_asks_has_its_fewest():
    day = Simulation(Autoscaling(min=2, max=6), clients(4.5, works=lambda now: now < 900))
    assert day.run(900).wanted >= 5
    day.run(PACE.grow_s + PACE.shrink_s + 60)
    assert day.wanted == 2
    assert len(day.serving()) == 2
    assert day.lines[-1][1].endswith("2 replicas, nothing was asked of it for 120 s")


def test_bursts_that_no_number_ends_are_tried_with_fewer_ever_more_rarely():
    work = clients(3.0, ranks=1, in_flight=6, burst=True)
    day = Simulation(Autoscaling(max=4), work).run(3 * 3600)
    assert day.wanted in (3, 4)
    turned = [at for at, number in day.history if number < 4]
    gaps = [b - a for a, b in pairwise(turned)]
    assert len(turned) <= 6
    assert all(later > 1.5 * earlier for earlier, later in pairwise(gaps))


def test_more_replicas_than_units_under_way_are_not_asked_for():
    day = Simulation(Autoscaling(max=8), clients(6.0, ranks=1, in_flight=3)).run(1800)
    assert day.wanted == 3


def test_slow_starts_are_waited_for():
    day = Simulation(Autoscaling(max=8, wait=0.05), clients(3.5), load_s=lambda now: 900.0)
    day.run(800)
    assert day.changes() == [2]
    day.run(4000)
    assert day.wanted in (4, 5)
    assert day.changes() == sorted(day.changes())


def test_a_placement_that_never_comes_is_given_up_and_tried_again_ever_more_rarely():
    day = Simulation(Autoscaling(max=4), clients(3.0), room=lambda now: 1).run(5400)
    given_up = [at for at, line in day.lines if "is given up" in line]
    tries = day.asked_for[1:]
    waits = [round((b - a) / 10) * 10 for a, b in zip(given_up, tries[1:], strict=False)]
    assert len(given_up) >= 4
    assert all(wait >= 60 for wait in waits)
    assert waits == sorted(waits)
    assert waits[-1] >= 900
    assert len(day.serving()) == 1
    assert day.lines[1][1] == (
        "replica-1 found no room within 300 s and is given up; the next try is in 60 s at the "
        "earliest"
    )


def test_room_that_comes_late_is_used_and_what_comes_unwanted_is_released():
    day = Simulation(
        Autoscaling(max=4),
        clients(3.0, works=lambda now: now < 150),
        room=lambda now: 4 if now > 320 else 1,
    ).run(1000)
    assert day.changes() == [2, 1]
    assert not day.late
    assert len(day.serving()) == 1
    late = Simulation(Autoscaling(max=4), clients(2.5), room=lambda now: 4 if now > 800 else 1)
    assert late.run(3000).wanted in (3, 4)
    assert late.waiting() < 0.05


def test_a_node_that_comes_and_goes_changes_no_number():
    def room(now: float) -> int:
        return 2 if 1000 < now < 1100 or 1300 < now < 1350 else 5

    day = Simulation(Autoscaling(max=5, wait=0.05), clients(3.5), room=room)
    before = day.run(990).wanted
    assert before in (4, 5)
    day.run(1000)
    assert day.wanted == before
    assert not day.changes(start=1000)
    assert len(day.serving()) == before


def test_a_node_that_stays_away_is_given_up_and_fetched_again_later():
    day = Simulation(
        Autoscaling(min=3, max=5, wait=0.1),
        clients(1.5),
        room=lambda now: 1 if 500 < now < 3000 else 5,
    )
    day.run(2500)
    assert len(day.serving()) == 1
    assert any("found no room within 300 s" in line for _, line in day.lines)
    day.run(4000)
    assert len(day.serving()) == 3


@pytest.mark.parametrize("phase", telling(["starting", "failed"], "failed"))
def test_replicas_that_die_are_back_or_replaced(phase):
    crashes = {600.0 + 300 * k: phase for k in range(5)}
    day = Simulation(Autoscaling(max=6, wait=0.05), clients(2.5), fails=crashes).run(5000)
    assert len(day.serving()) == day.wanted in (3, 4)
    given_up = [line for _, line in day.lines if "cannot serve: no memory" in line]
    assert len(given_up) == (5 if phase == "failed" else 0)


def at(phase: str, *, number: int = 0, since: float = 0.0) -> Replica:
    return Replica(f"s/replica-{number}", phase, since)  # type: ignore[arg-type]


def test_what_does_not_serve_goes_first_and_what_leaves_has_its_place_until_it_is_gone():
    there = (
        at("serving"),
        at("placing", number=1),
        at("serving", number=2),
        at("starting", number=3),
    )
    shrunk = decide(Observation(there), State(4), Autoscaling(max=1), 10.0, PACE)
    assert shrunk.release == ("s/replica-1", "s/replica-3")
    assert shrunk.drain == ("s/replica-2",)
    leaving = (at("serving"), at("leaving", number=1))
    assert decide(Observation(leaving), State(2), Autoscaling(max=2), 10.0, PACE).add == 0
    assert decide(Observation(leaving), State(2), Autoscaling(max=3), 10.0, PACE).add == 1


def test_waits_while_replicas_are_idle_are_not_theirs():
    serving = (at("serving"),)
    state = State(1, complete_since=0.0)
    for busy, wanted in ((0.1, 1), (0.3, 2)):
        seen = Observation(serving, waiting=0.4, busy=busy, units=4)
        assert decide(seen, state, Autoscaling(max=4), 60.0, PACE).state.wanted == wanted


def test_a_number_that_was_too_few_is_gone_back_to_when_work_eases_or_time_has_passed():
    serving = tuple(at("serving", number=k) for k in range(4))
    too_few = Memory(3, work=1.0, until=500.0, recall_s=600.0)
    state = State(4, complete_since=0.0, spare_since=0.0, too_few=too_few)

    def number(work: float, now: float) -> int:
        seen = Observation(serving, busy=work / 4, units=4)
        return decide(seen, state, Autoscaling(max=4), now, PACE).state.wanted

    assert number(1.0, 499.0) == 4
    assert number(1.0, 500.0) == 3
    assert number(0.99 * EASED, 499.0) == 2


def test_bounds_that_change_are_kept_at_once():
    serving = tuple(at("serving", number=k) for k in range(3))
    more = decide(Observation(serving), State(3), Autoscaling(min=5, max=8), 0.0, PACE)
    assert (more.state.wanted, more.add) == (5, 2)
    less = decide(Observation(serving), State(3), Autoscaling(max=2), 0.0, PACE)
    assert (less.state.wanted, less.drain) == (2, ("s/replica-2",))


def test_a_counter_tells_growth_within_its_window_and_begins_anew_when_it_falls():
    counter = Counter(10.0)
    for second in range(21):
        counter.note(second, 0.5 * second)
    assert counter.rate(20.0) == pytest.approx(0.5)
    assert counter.rate(25.0) == pytest.approx(0.25)
    assert counter.rate(31.0) == 0
    counter.note(21.0, 0.0)
    assert counter.rate(21.0) == 0


def test_the_run_that_waits_most_decides_and_its_ranks_count_alike():
    demand = Demand(10.0)
    for second in range(11):
        for run, client, share in (("a", "0", 0.2), ("a", "1", 0.6), ("b", "2", 0.1)):
            demand.report(Report(run, client, share * second, 0.0, 0, second % 4, 0), second)
    assert demand.waiting(10.0) == pytest.approx(0.4)
    assert demand.units(10.0) == 9
    assert demand.units(21.0) == 0
    assert demand.waiting(21.0) == 0
