"""The controller: observes where the student lags, decides the domain weights, keeps the log.

`Controller` is plain and holds nothing that is not in `weight_log.jsonl`; `ControllerActor` puts it
behind Ray; `RayControllerClient` is what rank 0 holds. Knows nothing of rows, models or devices.
"""

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.util.metrics
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.control.policies import Decision, Weights, limited, policy_for
from shared.config.run import Config
from shared.errors import ControllerError, TutelageError
from shared.mixture.decisions import decision_index, first_entry, next_entry
from shared.mixture.weight_log import DomainReport, WeightEntry, read_log, write_entry
from shared.run import exported, exporter
from teacher_service.service.replicas.nodes import of_the_head

_POLL_S = 5.0  # one long poll
_GRACE_S = 2.0  # an answer's way back after the last long poll
_RETRY_S = 0.2  # between attempts at an actor that is gone or restarting


@dataclass(frozen=True, slots=True)
class ControllerPlan:
    """Everything a controller is built from, again after every restart."""

    config: Config
    natural: Weights  # each domain's share of the corpus's loss tokens
    log_path: str  # weight_log.jsonl

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in config order."""
        return tuple(self.config.domains)


class Controller:
    """Turns reports into weight entries. Opening the same log again continues it."""

    def __init__(self, plan: ControllerPlan) -> None:
        self._plan = plan
        self._policy = policy_for(plan.config.mixture, domains=plan.domains, natural=plan.natural)
        self.log = read_log(Path(plan.log_path), plan.domains)
        opening = self._policy.opening()
        if opening and not self.log.entries:
            self._record(self._first(opening, report=None))

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names in the order of weights."""
        return self._plan.domains

    def observe(self, report: DomainReport) -> None:
        """Decide from a report. A step already decided keeps its recorded decision."""
        index, decided = decision_index(self._plan.config, report.step), len(self.log.entries)
        if index < decided:
            return
        if index > decided:
            raise ControllerError(
                f"a report of step {report.step} came while decision {decided} is still missing in "
                f"{self._plan.log_path}; put the whole log back or start with --fresh"
            )
        if index == 0:
            self._record(self._first(self._policy.first(report), report=report))
        else:
            self._record(self._next(report))

    def entry(self, index: int) -> WeightEntry:
        """Entry `index` of the log, which must have been decided."""
        if index >= len(self.log.entries):
            raise ControllerError(
                f"weight entry {index} is not decided yet; hand its report over first"
            )
        return self.log.entries[index]

    def peek(self, index: int) -> WeightEntry | None:
        """Entry `index` of the log, None where it is not decided yet."""
        return self.entry(index) if index < len(self.log.entries) else None

    def _first(self, decision: Decision, *, report: DomainReport | None) -> WeightEntry:
        return first_entry(
            limited(decision.weights, self._plan.config.mixture, previous=None),
            factors=decision.factors,
            report=report,
            domains=self._plan.domains,
        )

    def _next(self, report: DomainReport) -> WeightEntry:
        config, before = self._plan.config, self.log.entries
        decision = self._policy.next(self.log, report)
        weights = limited(decision.weights, config.mixture, previous=before[-1])
        return next_entry(config, before, report, weights=weights, factors=decision.factors)

    def _record(self, entry: WeightEntry) -> None:
        """Write the decision down, and only then show it."""
        write_entry(Path(self._plan.log_path), self._plan.domains, entry)
        self.log = self.log.appended(entry)


class ControllerActor:
    """A `Controller` in a process of its own; a restart replays the log."""

    def __init__(self, plan: ControllerPlan) -> None:
        self._run = plan.config.name
        self._controller = Controller(plan)
        self._decided = asyncio.Condition()
        exporter.start(ray.util.metrics, run=self._run).sample(self._export)

    def __repr__(self) -> str:
        return f"controller({self._run})"

    async def observe(self, report: DomainReport) -> None:
        """See `Controller.observe`."""
        self._controller.observe(report)
        async with self._decided:
            self._decided.notify_all()

    async def entry(self, index: int, wait_s: float) -> WeightEntry | None:
        """Entry `index`, waited for up to `wait_s` seconds; None when it is not decided by then."""
        async with self._decided:
            known = self._decided.wait_for(lambda: index < len(self._controller.log.entries))
            try:
                await asyncio.wait_for(known, wait_s)
            except TimeoutError:
                return None
        return self._controller.entry(index)

    async def ready(self) -> None:
        """Returns once the log is read."""

    def _export(self) -> None:
        """Set the gauges of what is decided. Called by another thread."""
        export = exporter.current()
        for entry in self._controller.log.entries[-1:]:
            for domain, weight in zip(self._controller.domains, entry.weights, strict=True):
                export.set(exported.DECIDED_WEIGHT, weight or None, domain=domain)


_ACTOR = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ControllerActor)


@dataclass(slots=True)
class _HandOver:
    """A report under way; without a reference it is to be sent, for the first time or again."""

    report: DomainReport
    sent: ray.ObjectRef | None = None

    def send(self, actor: Any) -> ray.ObjectRef:
        """Put the report on its way."""
        sent: ray.ObjectRef = actor.observe.remote(self.report)
        self.sent = sent
        return sent

    def is_answered(self) -> bool:
        """Whether the actor has answered, or died."""
        return self.sent is not None and _is_ready(self.sent)

    def acknowledge(self, actor: Any, *, timeout_s: float) -> None:
        """Wait until the report is recorded; where the actor died, it is to be sent again."""
        try:
            ray.get(self.sent or self.send(actor), timeout=timeout_s)
        except RayActorError:
            self.sent = None
            raise


def _is_ready(answer: ray.ObjectRef) -> bool:
    return bool(ray.wait([answer], timeout=0)[0])


class RayControllerClient:
    """The controller actor by name, with a deadline; calls are idempotent, so they are retried.

    For use from one thread, except that reports may be handed over while another waits for an
    entry. Nothing runs in the background here: a report is on its way as soon as it is handed over,
    and it is sent again, if it must be, by who waits for an entry.
    """

    def __init__(self, name: str, *, namespace: str, deadline_s: float) -> None:
        self._name, self._namespace, self._deadline_s = name, namespace, deadline_s
        self._under_way: deque[_HandOver] = deque()
        self._peeked: tuple[int, ray.ObjectRef] | None = None

    def observe(self, report: DomainReport) -> None:
        """See `ControllerClient`. A report is sent after the one before is known."""
        hand_over = _HandOver(report)
        if not self._under_way:
            with suppress(RayActorError, ValueError):  # gone or absent: `entry` sends it
                hand_over.send(self._actor())
        self._under_way.append(hand_over)

    def entry(self, index: int) -> WeightEntry:
        """See `ControllerClient`; the deadline counts from this call."""
        deadline = time.monotonic() + self._deadline_s
        trouble = ""
        while time.monotonic() < deadline:
            try:
                found = self._ask(index, deadline)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, TutelageError) else error) from None
            except (RayActorError, GetTimeoutError, ValueError) as error:
                trouble = f"last trouble: {type(error).__name__}"
                time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
                continue
            if found is not None:
                return found
            trouble = "it has no such entry yet"
        what = f"decide weight entry {index}"
        if self._under_way:
            what = f"take the report of step {self._under_way[0].report.step}"
        raise ControllerError(
            f"{self._name} in namespace {self._namespace} did not {what} within "
            f"{self._deadline_s:g} s ({trouble}); see the run's logs, or raise mixture.deadline_s"
        )

    def peek(self, index: int) -> WeightEntry | None:
        """See `ControllerClient`. Asks, and looks at the answer to an earlier peek;
        what is wrong with the controller or a report is for `entry` to say."""
        try:
            while self._under_way and self._under_way[0].is_answered():
                self._under_way[0].acknowledge(self._actor(), timeout_s=_GRACE_S)
                self._under_way.popleft()
            if self._peeked is None or self._peeked[0] != index:
                self._peeked = index, self._actor().entry.remote(index, _POLL_S)
            answer = self._peeked[1]
            if not _is_ready(answer):
                return None
            self._peeked = None
            return ray.get(answer)
        except (RayTaskError, RayActorError, GetTimeoutError, ValueError):
            self._peeked = None
            return None

    def _ask(self, index: int, deadline: float) -> WeightEntry | None:
        """One long poll for an entry, after every report handed over has been acknowledged."""
        actor = self._actor()
        while self._under_way:
            timeout_s = max(0.0, deadline - time.monotonic()) + _GRACE_S
            self._under_way[0].acknowledge(actor, timeout_s=timeout_s)
            self._under_way.popleft()
        left_s = max(0.0, deadline - time.monotonic())
        answer = actor.entry.remote(index, min(_POLL_S, left_s))
        return ray.get(answer, timeout=left_s + _GRACE_S)

    def _actor(self) -> Any:
        return ray.get_actor(self._name, namespace=self._namespace)


@dataclass(frozen=True, slots=True)
class ReplayController:
    """Serves the entries of another run's log, so that a run draws that run's rows.

    Satisfies `ControllerClient`; needs no Ray, and every report is ignored.
    """

    log_path: str
    domains: tuple[str, ...]

    def observe(self, report: DomainReport) -> None:
        """The decisions were made in the other run."""

    def entry(self, index: int) -> WeightEntry:
        """Entry `index` of the other run's log."""
        entries = read_log(Path(self.log_path), self.domains).entries
        if index >= len(entries):
            raise ControllerError(
                f"{self.log_path} has {len(entries)} entries and entry {index} is asked for; let "
                "the run that writes it finish first"
            )
        return entries[index]

    def peek(self, index: int) -> WeightEntry:
        """Entry `index` of the other run's log, which is whole."""
        return self.entry(index)


def open_controller(name: str, *, namespace: str, deadline_s: float) -> RayControllerClient:
    """A client; `functools.partial` of it is a `shared.run.plan.OpenController`."""
    return RayControllerClient(name, namespace=namespace, deadline_s=deadline_s)


def start_controller(
    plan: ControllerPlan, *, name: str, namespace: str, deadline_s: float, detached: bool = False
) -> ActorHandle:
    """Start the actor, wait until it has read its log, and return its handle."""
    actor = begin_controller(
        plan, name=name, namespace=namespace, deadline_s=deadline_s, detached=detached
    )
    await_controller(actor, name=name, deadline_s=deadline_s)
    return actor


def begin_controller(
    plan: ControllerPlan, *, name: str, namespace: str, deadline_s: float, detached: bool = False
) -> ActorHandle:
    """Let the actor come up and return its handle.

    One left over under this name is replaced: all it knew is in the log, and its plan may be old.
    Unless detached it ends with the handle, which the caller therefore keeps, or the driver.
    """
    read_log(Path(plan.log_path), plan.domains)  # a broken log is a sentence here, not a dead actor
    stop_controller(name, namespace=namespace, deadline_s=deadline_s)
    actor: Any = _ACTOR.options(
        name=name,
        namespace=namespace,
        lifetime="detached" if detached else None,
        resources=of_the_head(),
    ).remote(plan)
    return actor


def await_controller(actor: Any, *, name: str, deadline_s: float) -> None:
    """Wait until the actor has read its log. Raises ControllerError."""
    try:
        ray.get(actor.ready.remote(), timeout=deadline_s)
    except (RayActorError, GetTimeoutError) as error:
        raise ControllerError(
            f"{name} did not start within {deadline_s:g} s ({type(error).__name__}); "
            "see the logs of the Ray session"
        ) from error


def stop_controller(name: str, *, namespace: str, deadline_s: float = 30.0) -> None:
    """End the actor and wait until its name is free; one that is not there is no error."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        except ValueError:
            return
        if time.monotonic() > deadline:
            raise ControllerError(f"{name} did not stop within {deadline_s:g} s")
        time.sleep(_RETRY_S / 4)
