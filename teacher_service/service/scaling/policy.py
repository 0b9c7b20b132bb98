"""Scaling: how many replicas a teacher service shall have, as a function of what is seen of it.

`decide` is pure: it looks at an observation, the state that it returned before, and a clock.

Let n replicas serve, w be the share of their time that steps wait for them, b the share of their
time that they compute, and L = n b the work there is, in replicas.

- **Growth.** A teacher that fills the 1 - w of a step in which nobody waits needs n / (1 - w)
  replicas. That many are wanted, at most 2 n at a time, where w is above `wait` and all that were
  wanted have served for `grow_s`. Never more than units are under way, since a replica scores one
  at a time, and none where replicas compute less than half as much as steps wait: more of them
  would not end those waits.
- **Shrinkage.** The fewest that L fills to at most FULL, where they were fewer than wanted, and w
  not above `wait`, for all of `shrink_s`.
- **Memory.** A number from which a service grew was too few for the work of then. Unless the work
  is EASED below that, it is not gone back to within `recall_s`, and afterwards by no more than to
  that number; each time that it proves too few again it is remembered for twice as long. So a load
  that stays makes a number that stays, and one decision that a hiccup caused is taken back.
- **What does not come.** A replica that finds no room within `place_s`, does not load within
  `start_s` or cannot load is given up. The next is asked for after `retry_s`, which doubles up to
  `retry_most_s` until one that was asked for then serves.
- **Bounds.** Never fewer than `min` are wanted. Those that exist, with those that leave, are never
  more than `max`. What is no longer wanted goes: those that do not serve yet at once, the youngest
  of the others after their work.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from shared.config.models.teachers import Autoscaling

FULL = 0.7  # share of its time that a replica may compute after others have gone
EASED = 0.8

Phase = Literal["placing", "starting", "serving", "failed", "leaving"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long decisions take, in seconds."""

    grow_s: float = 30.0  # over which waits and work are measured
    shrink_s: float = 120.0
    recall_s: float = 600.0
    place_s: float = 300.0
    start_s: float = 1800.0
    retry_s: float = 60.0
    retry_most_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica, in its phase since a time of the clock."""

    name: str
    phase: Phase
    since: float
    reason: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class Observation:
    """A service over the last `grow_s` seconds."""

    replicas: tuple[Replica, ...]  # oldest first
    waiting: float = 0.0  # share of their time that steps waited for answers, 0 to 1
    busy: float = 0.0  # mean share of their time that those that serve computed, 0 to 1
    units: int = 0  # most that clients had under way


@dataclass(frozen=True, slots=True)
class Memory:
    """A number of replicas that was too few for some work, until when to remember it, and how long
    that was."""

    number: int = 0
    work: float = 0.0
    until: float = -math.inf
    recall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """What the next decision needs of those before; times are the clock's."""

    wanted: int
    complete_since: float | None = None  # all that are wanted serve
    spare_since: float | None = None  # fewer would do
    too_few: Memory = Memory()
    retry_at: float = -math.inf
    retry_s: float = 0.0  # that the next retry waits for; 0: none has failed


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and the state to decide with next."""

    state: State
    add: int = 0
    release: tuple[str, ...] = ()  # at once
    drain: tuple[str, ...] = ()  # after the work they were sent
    lines: tuple[str, ...] = ()  # for people, without the service's name


def decide(
    seen: Observation, state: State, bounds: Autoscaling, now: float, pace: Pace
) -> Decision:
    """One decision by the law above; called about once a second."""
    there = [one for one in seen.replicas if one.phase != "leaving"]
    lost = [(one, why) for one in there if (why := _gives_up(one, now, pace))]
    there = [one for one in there if one not in [one for one, _ in lost]]
    state = _bounded(state, bounds)
    lines: list[str] = []
    if lost:
        state, line = _given_up(state, lost, there, bounds, now, pace)
        lines.append(line)
    state = _timed(seen, state, there, bounds, now)
    wanted, why = _grown(seen, state, there, bounds, now, pace)
    if not why:
        wanted, why = _shrunk(seen, state, there, bounds, now, pace)
    if why:
        lines.append(f"{state.wanted} -> {replicas(wanted)}, {why}")
        if wanted > state.wanted:
            state = _remembered(state, len(there), len(there) * seen.busy, now, pace)
        state = replace(state, wanted=wanted, complete_since=None, spare_since=None)
    release, drain = _surplus(there, state.wanted)
    room = bounds.max - len(seen.replicas) + len(lost)
    missing = min(state.wanted - len(there), room) if now >= state.retry_at else 0
    return Decision(
        state=state,
        add=max(0, missing),
        release=(*(one.name for one, _ in lost), *release),
        drain=drain,
        lines=tuple(lines),
    )


def replicas(number: int) -> str:
    """A number of replicas in words."""
    return f"{number} replica{'s' if number != 1 else ''}"


def in_words(bounds: Autoscaling) -> str:
    """What a service of these bounds does."""
    return (
        f"from {bounds.min} to {replicas(bounds.max)}, more where steps wait above "
        f"{_percent(bounds.wait)} of their time"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _bounded(state: State, bounds: Autoscaling) -> State:
    """Bounds may have changed."""
    return replace(state, wanted=min(max(state.wanted, bounds.min), bounds.max))


def _gives_up(one: Replica, now: float, pace: Pace) -> str:
    """Why a replica is given up; empty where it is not."""
    if one.phase == "placing" and now - one.since > pace.place_s:
        return f"found no room within {pace.place_s:g} s"
    if one.phase == "starting" and now - one.since > pace.start_s:
        return f"did not load within {pace.start_s:g} s"
    return f"cannot serve: {one.reason}" if one.phase == "failed" else ""


def _given_up(
    state: State,
    lost: list[tuple[Replica, str]],
    there: list[Replica],
    bounds: Autoscaling,
    now: float,
    pace: Pace,
) -> tuple[State, str]:
    """Fewer are wanted, and the next is asked for later."""
    wait_s = state.retry_s or pace.retry_s
    names = ", ".join(one.name.rpartition("/")[2] for one, _ in lost)
    line = f"{names} {lost[0][1]} and is given up; the next try is in {wait_s:g} s at the earliest"
    state = replace(
        state,
        wanted=max(bounds.min, min(state.wanted, len(there))),
        retry_at=now + wait_s,
        retry_s=min(2 * wait_s, pace.retry_most_s),
    )
    return state, line


def _timed(
    seen: Observation, state: State, there: list[Replica], bounds: Autoscaling, now: float
) -> State:
    """Since when all serve, and since when fewer would do."""
    complete = len(there) == state.wanted and all(one.phase == "serving" for one in there)
    arrived = any(one.phase == "serving" and one.since > state.retry_at for one in there)
    spare = seen.waiting <= bounds.wait and _enough(seen, state, bounds, now) < state.wanted
    return replace(
        state,
        complete_since=_since(state.complete_since, complete, now),
        spare_since=_since(state.spare_since, spare, now),
        retry_s=0.0 if arrived else state.retry_s,
    )


def _since(before: float | None, holds: bool, now: float) -> float | None:
    return (now if before is None else before) if holds else None


def _grown(
    seen: Observation,
    state: State,
    there: list[Replica],
    bounds: Autoscaling,
    now: float,
    pace: Pace,
) -> tuple[int, str]:
    """The number wanted from now on and why; no reason where it stays."""
    n, waits = len(there), seen.waiting
    settled = state.complete_since is not None and now - state.complete_since >= pace.grow_s
    if not settled or waits <= bounds.wait or seen.busy < waits / 2 or now < state.retry_at:
        return state.wanted, ""
    needed = math.ceil(n / (1 - min(waits, 0.5)) - 1e-6)
    wanted = min(max(needed, n + 1), bounds.max, seen.units)
    if wanted <= n:
        return state.wanted, ""
    return (
        wanted,
        f"steps waited {_percent(waits)} of their time for it, above {_percent(bounds.wait)}",
    )


def _shrunk(
    seen: Observation,
    state: State,
    there: list[Replica],
    bounds: Autoscaling,
    now: float,
    pace: Pace,
) -> tuple[int, str]:
    if state.spare_since is None or now - state.spare_since < pace.shrink_s:
        return state.wanted, ""
    wanted = _enough(seen, state, bounds, now)
    if not seen.units and not seen.busy:
        return wanted, f"nothing was asked of it for {pace.shrink_s:g} s"
    return wanted, (
        f"steps waited {_percent(seen.waiting)} of their time for it, and its replicas computed "
        f"{_percent(seen.busy)} of theirs"
    )


def _enough(seen: Observation, state: State, bounds: Autoscaling, now: float) -> int:
    """The fewest replicas that would do."""
    serving = sum(one.phase == "serving" for one in seen.replicas)
    work, memory = serving * seen.busy, state.too_few
    fewest = math.ceil(work / FULL - 1e-6)
    if work > EASED * memory.work:
        fewest = max(fewest, memory.number + (now < memory.until))
    return min(max(fewest, bounds.min), bounds.max)


def _remembered(state: State, number: int, work: float, now: float, pace: Pace) -> State:
    """The state after growth from a number of replicas."""
    again = number == state.too_few.number
    recall_s = 2 * state.too_few.recall_s if again else pace.recall_s
    return replace(state, too_few=Memory(number, work, now + recall_s, recall_s))


def _surplus(there: list[Replica], wanted: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Replicas that go at once, and those that go after their work."""
    order: dict[str, int] = {"placing": 0, "starting": 1, "serving": 2}
    oldest_last = sorted(enumerate(there), key=lambda place: (order[place[1].phase], -place[0]))
    going = [one for _, one in oldest_last[: max(0, len(there) - wanted)]]
    return (
        tuple(one.name for one in going if one.phase != "serving"),
        tuple(one.name for one in going if one.phase == "serving"),
    )
