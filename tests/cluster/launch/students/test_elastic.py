"""Laws of the number of workers, over random courses of the room and of losses."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from cluster.launch.students.elastic import Pace, State, begun, looked, placeable

PACE = Pace(look_s=5.0, steady_s=30.0, settle_s=300.0, settle_most_s=1200.0)
SAVED_EVERY_S = 40.0
Room = Callable[[float], int]


@dataclass
class Day:
    """A run on a cluster with so much room at a time, whose workers grow at checkpoints."""

    counts: tuple[int, ...]
    room: Room
    taken: Callable[[float], int] = lambda now: 0  # of the room, just before it is asked for
    history: list[tuple[float, int, str]] = field(default_factory=list)
    looks: list[tuple[float, State]] = field(default_factory=list)

    def run(self, seconds: float) -> "Day":
        state: State | None = None
        saved, now = 0.0, 0.0
        while now < seconds:
            now += PACE.look_s
            why = "loss" if state and self.room(now) < state.workers else ""
            if state and not why and now - saved >= SAVED_EVERY_S:
                saved, why = now, "growth" if state.growing else ""
            if state is None or why:
                number = placeable(self.counts, self.room(now) - self.taken(now))
                if number is None:
                    state = None
                    continue
                self.history.append((now, number, why or "start"))
                state = begun(state, number, now, PACE)
            state = looked(state, self.counts, self.room(now), now, PACE)
            self.looks.append((now, state))
        return self

    @property
    def numbers(self) -> list[int]:
        return [number for _, number, _ in self.history]


def test_a_run_has_as_many_workers_as_find_room():
    assert [placeable((1, 2, 4), room) for room in (0, 1, 2, 3, 4, 9)] == [None, 1, 2, 2, 4, 4]
    assert placeable((2, 4), 1) is None


def test_room_that_stays_is_taken_once_it_has_settled():
    day = Day((1, 2, 4), lambda now: 1 if now < 1000 else 3).run(3000)
    assert day.numbers == [1, 2]
    assert 1000 + PACE.steady_s <= day.history[-1][0] <= 1000 + PACE.steady_s + 2 * SAVED_EVERY_S


def test_a_node_that_leaves_and_comes_back_is_missed_for_as_long_as_workers_settle():
    day = Day((1, 2), lambda now: 1 if 500 < now < 520 else 2).run(2000)
    assert [(number, why) for _, number, why in day.history] == [
        (2, "start"),
        (1, "loss"),
        (2, "growth"),
    ]
    assert day.history[2][0] - day.history[1][0] >= PACE.settle_s


def test_room_that_comes_and_goes_restarts_nobody():
    flickers = Day((1, 2), lambda now: 1 + int(now // 20 % 2))
    assert flickers.run(10_000).numbers == [1]


def test_room_that_others_take_first_is_tried_less_and_less_often():
    day = Day((1, 2), lambda now: 1 if now < 10 else 2, taken=lambda now: now > 10).run(20_000)
    times = [now for now, _, why in day.history if why == "growth"]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert set(day.numbers) == {1}
    assert gaps == sorted(gaps)
    assert gaps[0] >= 2 * PACE.settle_s
    assert PACE.settle_most_s <= gaps[-1] <= PACE.settle_most_s + 2 * SAVED_EVERY_S


def test_a_growth_that_came_sets_the_pace_back():
    tried = State(1, since=0.0, settle_s=1200.0, more=2, growing=True)
    assert begun(tried, 2, 10.0, PACE).settle_s == PACE.settle_s
    assert begun(tried, 1, 10.0, PACE).settle_s == PACE.settle_most_s
    lost = State(2, since=0.0, settle_s=600.0)
    assert begun(lost, 1, 10.0, PACE).settle_s == 600.0


@pytest.mark.parametrize("seed", range(30))
def test_laws_hold_over_random_courses(seed):
    chance = random.Random(seed)
    counts = tuple(sorted(chance.sample(range(1, 9), chance.randint(1, 4))))
    changes = [(0.0, chance.randint(0, 9))]
    while changes[-1][0] < 20_000:
        changes.append((changes[-1][0] + chance.expovariate(1 / 250), chance.randint(0, 9)))

    def room(now: float) -> int:
        return [amount for when, amount in changes if when <= now][-1]

    day = Day(counts, room).run(20_000)
    assert day.history or max(amount for _, amount in changes) < counts[0]
    for now, number, why in day.history:
        assert number in counts
        assert number <= room(now)
        assert all(count > room(now) for count in counts if count > number)
        if why == "growth":
            when, before = max((when, n) for when, n, _ in day.history if when < now)
            assert number > before or room(now) < room(now - PACE.look_s)
            assert now - when >= PACE.settle_s
    for now, state in day.looks:
        if state.growing:
            assert state.more in counts
            assert state.workers < state.more <= room(now)
            window = [room(now - back) for back in range(0, int(PACE.steady_s), 5)]
            assert min(window) >= state.more
