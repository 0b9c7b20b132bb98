"""A teacher service on a cluster that is not there: time in ticks, decisions by the real policy.

Clients, replicas and nodes are simulated unit by unit; what is decided from them is decided by
`decide`, from what `Demand` makes of their reports.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.config.models.teachers import Autoscaling
from teacher_service.service.scaling.demand import Demand, Report
from teacher_service.service.scaling.policy import Observation, Pace, Phase, Replica, State, decide

TICK_S = 0.05
TICKS_PER_S = 20
PACE = Pace()
Timed = Callable[[float], float]  # a value that changes with the time


@dataclass(eq=False)
class Unit:
    """One unit under way."""

    left_s: float
    answered: bool = False


@dataclass(eq=False)
class Client:
    """A rank that learns from one unit at a time, in order.

    With `burst` it asks for `in_flight` units at once, whenever it has learnt from all it had.
    """

    learn_s: Timed
    score_s: Timed
    in_flight: int = 8
    burst: bool = False
    works: Callable[[float], bool] = lambda now: True
    units: deque[Unit] = field(default_factory=deque)
    learning_s: float = 0.0
    wait_s: float = 0.0

    def tick(self, now: float, noise: Callable[[], float]) -> list[Unit]:
        """Learn, or wait for the oldest unit; returns the units it asks for."""
        asked: list[Unit] = []
        if self.works(now) and not (self.burst and (self.units or self.learning_s > 0)):
            number = self.in_flight - len(self.units)
            asked = [Unit(self.score_s(now) * noise()) for _ in range(number)]
            self.units.extend(asked)
        if self.learning_s > 0:
            self.learning_s -= TICK_S
        elif self.units and self.units[0].answered:
            self.units.popleft()
            self.learning_s += self.learn_s(now) - TICK_S
        elif self.units:
            self.wait_s += TICK_S
        return asked


@dataclass(eq=False)
class Server:
    """One replica."""

    name: str
    phase: Phase
    since: float
    queue: deque[Unit] = field(default_factory=deque)
    busy_s: float = 0.0

    def enter(self, phase: Phase, now: float) -> None:
        """Be in another phase from now on."""
        self.phase, self.since = phase, now

    def tick(self) -> None:
        """Score for one tick."""
        if self.queue:
            self.busy_s += TICK_S
            self.queue[0].left_s -= TICK_S
            if self.queue[0].left_s <= 0:
                self.queue.popleft().answered = True


@dataclass(eq=False)
class Simulation:
    """A service from its start on; `history` has the number wanted whenever it changes."""

    bounds: Autoscaling
    clients: Sequence[Client]
    pace: Pace = PACE
    room: Callable[[float], int] = lambda now: 10**6  # replicas that the cluster holds
    load_s: Timed = lambda now: 5.0
    fails: dict[float, Phase] = field(default_factory=dict)  # when one falls back to a phase
    seed: int = 0
    now: float = 0.0
    history: list[tuple[float, int]] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    asked_for: list[float] = field(default_factory=list)  # when a replica was asked for
    late: int = 0  # replicas that serve though they are not wanted

    def __post_init__(self) -> None:
        self._random, self._made = random.Random(self.seed), 0
        self._demand, self._servers = Demand(self.pace.grow_s), list[Server]()
        self._state = State(self.bounds.min)
        for _ in range(self.bounds.min):
            self._add().enter("serving", 0.0)

    def run(self, seconds: float) -> "Simulation":
        """Go on for so long."""
        for tick in range(round(seconds * TICKS_PER_S)):
            self.now += TICK_S
            for client in self.clients:
                for unit in client.tick(self.now, lambda: self._random.uniform(0.8, 1.2)):
                    self._send(unit)
            for server in self._servers:
                server.tick()
            if tick % TICKS_PER_S == 0:
                self._second()
        return self

    @property
    def wanted(self) -> int:
        """Replicas wanted at the end."""
        return self._state.wanted

    def serving(self) -> list[Server]:
        """Replicas that serve."""
        return [server for server in self._servers if server.phase == "serving"]

    def changes(self, start: float = 0.0) -> list[int]:
        """The numbers wanted, after every change since `start`."""
        return [number for at, number in self.history if at >= start]

    def waiting(self) -> float:
        """Share of the last seconds that steps waited."""
        return self._demand.waiting(self.now)

    def _second(self) -> None:
        self._cluster()
        for rank, client in enumerate(self.clients):
            sent = sum(not unit.answered for unit in client.units)
            self._demand.report(
                Report("run", str(rank), client.wait_s, 0.0, sent, sent, 0), self.now
            )
        self._demand.work({s.name: s.busy_s for s in self.serving()}, self.now)
        seen = Observation(
            tuple(Replica(s.name, s.phase, s.since, "no memory") for s in self._servers),
            waiting=self._demand.waiting(self.now),
            busy=self._demand.busy(self.now),
            units=self._demand.units(self.now),
        )
        decision = decide(seen, self._state, self.bounds, self.now, self.pace)
        if decision.state.wanted != self._state.wanted:
            self.history.append((self.now, decision.state.wanted))
        self._state = decision.state
        self.lines += [(self.now, line) for line in decision.lines]
        for server in [s for s in self._servers if s.name in decision.release]:
            self._servers.remove(server)
            self._resend(server)
        for server in self._servers:
            if server.name in decision.drain:
                server.enter("leaving", self.now)
        for _ in range(decision.add):
            self._add()
        assert len(self._servers) <= self.bounds.max, "never beyond the most"
        assert self.bounds.min <= self.wanted <= self.bounds.max

    def _cluster(self) -> None:
        """Nodes come and go, replicas are placed, load, fail and leave."""
        for at in [at for at in self.fails if at <= self.now]:
            phase = self.fails.pop(at)
            if serving := self.serving():
                serving[0].enter(phase, self.now)
                self._resend(serving[0])
        placed = [s for s in self._servers if s.phase != "placing"]
        while len(placed) > self.room(self.now):  # a node is gone
            server = placed.pop()
            server.enter("placing", self.now)
            self._resend(server)
        for server in [s for s in self._servers if s.phase == "placing"]:
            if len(placed) < self.room(self.now) and self.now > server.since:
                server.enter("starting", self.now)
                placed.append(server)
        for server in self._servers:
            if server.phase == "starting" and self.now - server.since >= self.load_s(self.now):
                server.enter("serving", self.now)
                self.late += len(self.serving()) > self.wanted
        self._servers = [s for s in self._servers if s.phase != "leaving" or s.queue]

    def _add(self) -> Server:
        server = Server(f"s/replica-{self._made}", "placing", self.now)
        self._made += 1
        self._servers.append(server)
        self.asked_for.append(self.now)
        return server

    def _send(self, unit: Unit) -> None:
        """To the least loaded, as pools do; where none serves, to whichever comes first."""
        serving = self.serving() or self._servers
        min(serving, key=lambda server: len(server.queue)).queue.append(unit)

    def _resend(self, server: Server) -> None:
        units, server.queue = list(server.queue), deque()
        for unit in units:
            self._send(unit)
