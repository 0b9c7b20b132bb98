"""Elastic workers: on how many a student trains, as a function of the room that was seen.

All here is pure; times are those of the caller's clock, in seconds. Let C be the numbers of workers
that a run may have, and r the most that there is room for at a time, those that train counted in.

- **Start**, and start again after a loss: the largest of C within r; none where r is below all of
  C, which is waited for.
- **Growth.** While n train, the least r of the last `steady_s` decides: the largest of C within it,
  where that is above n and the workers have trained for `settle_s`. What is decided is taken back
  when room is lost before it is done.
- **Memory.** Room may be gone by the time that it is taken. A growth that did not come to more than
  n doubles the next `settle_s`, up to `settle_most_s`; one that did sets it back.
- **Loss.** Only a worker that is lost makes fewer; nobody is sent away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Pace:
    """How long decisions take, in seconds."""

    look_s: float = 5.0  # between looks at the room
    steady_s: float = 30.0
    settle_s: float = 300.0
    settle_most_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class State:
    """What decides about workers that train; times are the clock's."""

    workers: int
    since: float  # they train
    settle_s: float
    more: int | None = None  # that there was room for since `more_since`; None: no more than train
    more_since: float = 0.0
    growing: bool = False  # they were to become more


def placeable(counts: Sequence[int], room: int) -> int | None:
    """The largest of the ascending `counts` within the room; None where all are above it."""
    return max((count for count in counts if count <= room), default=None)


def begun(before: State | None, workers: int, now: float, pace: Pace) -> State:
    """The state of `workers` that begin to train, after those of `before`."""
    if before is None or not before.growing:
        settle_s = before.settle_s if before else pace.settle_s
    elif workers > before.workers:
        settle_s = pace.settle_s
    else:
        settle_s = min(2 * before.settle_s, pace.settle_most_s)
    return State(workers, since=now, settle_s=settle_s)


def looked(state: State, counts: Sequence[int], room: int, now: float, pace: Pace) -> State:
    """The state after a look; `growing` says whether they shall become `more`."""
    found = placeable(counts, room)
    if found is None or found <= state.workers:
        return replace(state, more=None, growing=False)
    if state.more is None:
        state = replace(state, more=found, more_since=now)
    more = min(found, state.more or found)
    steady = now - state.more_since >= pace.steady_s and now - state.since >= state.settle_s
    return replace(state, more=more, growing=steady)
