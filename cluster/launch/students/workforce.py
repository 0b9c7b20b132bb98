"""How many workers a training has: chosen where they are placed, followed while they train."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cluster.launch.students.elastic import Pace, State, begun, looked, placeable
from cluster.session import placement
from cluster.session.placement import Bundle, Demand
from shared.errors import StorageError
from shared.in_words import counted
from shared.run import exported, exporter
from shared.run.run_dir import RunDir, write_atomically
from teacher_service.service.replicas.nodes import Awaited

PACE = Pace()
SETTLING_S = 8.0  # until places of workers that ended are free, and a lost node's are gone
BEGIN_S = 2.0
POLL_S = 0.5


class Workforce:
    """The workers of one training, by number; its methods are called by who waits for them, and
    `choose`, `up` and `down` by Ray Train's loop, in a thread."""

    def __init__(self, counts: Sequence[int], bundle: Bundle, files: RunDir) -> None:
        self._counts, self._bundle, self._files = counts, bundle, files
        self._state: State | None = None
        self._beside: Sequence[Demand] = ()
        self._nodes: Counter[str] = Counter()  # that have workers
        self._present = 0
        self._waits = False
        self._awaited = Awaited(bundle)

    @property
    def scales(self) -> bool:
        """Whether there is more than one number to choose from."""
        return len(self._counts) > 1

    def begin(self, beside: Sequence[Demand]) -> None:
        """Leave room for these demands, which are placed after the first workers."""
        self._beside = beside
        self._export(0)

    def choose(self) -> int:
        """The number for which there is room; the fewest where there is none, which Ray waits for.

        A fixed number is not looked at before its first workers, whose room is known.
        """
        if self._state is None and not self.scales:
            return self._counts[0]
        self._awaited.release()
        patience_s = BEGIN_S if self._state is None else SETTLING_S
        deadline = time.monotonic() + patience_s
        while (room := self._room()) < self._aim and time.monotonic() < deadline:
            time.sleep(POLL_S)
        number = placeable(self._counts, room)
        if number is None and not self._waits:
            self._waits = True
            needed = counted(self._counts[0], "student worker")
            print(f"no room for {needed}; training goes on once there is", flush=True)
        return number or self._counts[0]

    def up(self, nodes: Sequence[str]) -> None:
        """Note the workers that are up, by the node of each."""
        before, number = self._state, len(nodes)
        self._nodes, self._waits, self._beside = Counter(nodes), False, ()
        self._state = begun(before, number, time.monotonic(), PACE)
        self._export(number)
        self._awaited.ask(self._counts[-1] - number)
        if self.scales and (before is None or before.growing or number != before.workers):
            came_from = f"{before.workers} -> " if before else ""
            bounds = f"from {self._counts[0]} to {self._counts[-1]}"
            print(f"student: {came_from}{counted(number, 'worker')}, {bounds}", flush=True)

    def down(self) -> None:
        """Note that the workers end."""
        self._export(0)

    def look(self) -> None:
        """Ask workers that take steps to end at their next checkpoint where there is room for more,
        and take it back where there is none any more."""
        state = self._state
        if state is None or not self._present or state.workers == self._counts[-1]:
            return
        if not self._files.stepping.exists():
            return
        missing = self._counts[-1] - state.workers
        room = state.workers + min(missing, self._awaited.placed() + self._room(most=missing))
        self._state = looked(state, self._counts, room, time.monotonic(), PACE)
        if self._state.growing and not state.growing:
            more = counted(self._state.more or 0, "worker")
            print(f"there is room for {more}, who go on from the next checkpoint", flush=True)
            self._files.growth_request.touch()
        elif not self._state.growing:
            self._files.growth_request.unlink(missing_ok=True)

    def lost(self) -> str | None:
        """After a failure: how many workers were lost with which nodes, in words; None where no
        node was. Waits for Ray to notice."""
        if self._state is not None:
            self._state = replace(self._state, growing=False)
        gone = placement.lost_nodes(list(self._nodes))
        if not gone:
            return None
        workers, all_workers = sum(self._nodes[node] for node in gone), self._nodes.total()
        nodes = f"node{'s' if len(gone) > 1 else ''} {', '.join(sorted(gone.values()))}"
        return f"{workers} of {counted(all_workers, 'student worker')} lost with {nodes}"

    def close(self) -> None:
        """Leave nothing behind that only holds while a command trains."""
        self._awaited.release()
        for path in (self._files.workers, self._files.growth_request):
            path.unlink(missing_ok=True)

    @property
    def _aim(self) -> int:
        """The number that one may hope for."""
        state = self._state
        if state is None:
            return self._counts[-1]
        return (state.more or state.workers) if state.growing else state.workers

    def _room(self, most: int | None = None) -> int:
        most = self._counts[-1] if most is None else most
        return placement.room_for(self._bundle, most, beside=self._beside)

    def _export(self, present: int) -> None:
        self._present, wanted = present, self._counts[-1]
        exporter.current().set(exported.WORKERS_WANTED, wanted)
        exporter.current().set(exported.WORKERS_PRESENT, present)
        described = {"fewest": self._counts[0], "wanted": wanted, "present": present}
        try:
            write_atomically(self._files.workers, json.dumps(described))
        except StorageError:
            return  # where there is no disk, training says so
