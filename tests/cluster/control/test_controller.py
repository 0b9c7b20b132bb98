"""The controller decides once, remembers through any restart, and never keeps a student hanging."""

import functools
import os
import pickle
import shutil
import signal
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster.control.controller import (
    Controller,
    ControllerPlan,
    RayControllerClient,
    ReplayController,
    open_controller,
    start_controller,
    stop_controller,
)
from shared.config.mixture import DDKMixture, FixedMixture
from shared.errors import ControllerError, NonFiniteLossError
from shared.mixture.weight_log import DomainReport, WeightEntry, read_log
from tests.cluster.run_dirs import controlled

NAMES = ("math", "code", "law")
NATURAL = (0.6, 0.3, 0.1)
DDK = DDKMixture(interval=10, lag_steps=2)
IMMEDIATELY_MS = 250  # on a busy machine; in fact a few milliseconds


def _plan(folder: Path, mixture: FixedMixture | DDKMixture = DDK) -> ControllerPlan:
    return ControllerPlan(
        config=controlled(mixture, domains=NAMES),
        natural=NATURAL,
        log_path=str(folder / "weight_log.jsonl"),
    )


def _report(step: int, *, shift: float = 0.0) -> DomainReport:
    """Validation sums that depend on the step; `shift` disturbs them."""
    nll_D = np.array([2.5, 2.2 - step / 100, 1.8]) + shift
    return DomainReport(step, tuple((nll_D * 100).tolist()), (100, 100, 100), (2.0, 2.0, 1.6))


def _entries(plan: ControllerPlan) -> tuple[WeightEntry, ...]:
    return read_log(Path(plan.log_path), NAMES).entries


def _undisturbed(folder: Path, *, steps: tuple[int, ...]) -> tuple[WeightEntry, ...]:
    """What a controller decides that nothing happens to."""
    (folder / "undisturbed").mkdir()
    alone = Controller(_plan(folder / "undisturbed"))
    for step in steps:
        alone.observe(_report(step))
    return alone.log.entries


def test_ddk_starts_natural_and_then_follows_the_equations(tmp_path: Path) -> None:
    controller = Controller(_plan(tmp_path))
    for step in (0, 10, 20):
        controller.observe(_report(step))
    entries = [controller.entry(i) for i in range(3)]
    assert [(e.decided_at, e.effective_from) for e in entries] == [(0, 0), (10, 12), (20, 22)]
    assert entries[0].weights == pytest.approx(NATURAL, abs=1e-15)
    ratio = [
        np.exp(np.array([2.5, 2.2 - step / 100, 1.8]) - [2.0, 2.0, 1.6]) for step in (0, 10, 20)
    ]
    r = np.exp(ratio[0]) / np.exp(ratio[0]).sum()
    np.testing.assert_allclose(entries[0].factors, r, atol=1e-12)
    for i in (1, 2):
        psi = r * np.exp(ratio[i])
        r = 0.5 * psi / psi.sum() + 0.5 / 3
        np.testing.assert_allclose(entries[i].weights, r, atol=1e-12)


def test_ddk_may_start_from_its_own_factors(tmp_path: Path) -> None:
    controller = Controller(_plan(tmp_path, DDKMixture(interval=10, start="ddk")))
    controller.observe(_report(0))
    entry = controller.entry(0)
    assert entry.weights == entry.factors != NATURAL


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("natural", NATURAL),
        ("uniform", (1 / 3, 1 / 3, 1 / 3)),
        ({"law": 2.0, "math": 1.0, "code": 1.0}, (0.25, 0.25, 0.5)),
    ],
)
def test_fixed_weights_are_known_at_once_and_never_change(
    tmp_path: Path, weights: Any, expected: tuple[float, ...]
) -> None:
    plan = _plan(tmp_path, FixedMixture(weights=weights))
    controller = Controller(plan)
    assert controller.entry(0).weights == pytest.approx(expected, abs=1e-15)
    controller.observe(_report(0))
    controller.observe(_report(500))
    assert Controller(plan).log.entries == _entries(plan) == (controller.entry(0),)


def test_the_recorded_decision_wins_over_a_second_report_of_its_step(tmp_path: Path) -> None:
    controller = Controller(_plan(tmp_path))
    for step in (0, 10):
        controller.observe(_report(step))
    before = controller.log
    controller.observe(_report(10, shift=0.3))
    controller.observe(_report(0, shift=0.3))
    assert controller.log == before == read_log(tmp_path / "weight_log.jsonl", NAMES)


def test_a_decision_is_on_disk_before_it_is_visible(tmp_path: Path) -> None:
    """With the log's folder gone nothing can be written, so nothing may be shown either."""
    folder = tmp_path / "run"
    folder.mkdir()
    controller = Controller(_plan(folder))
    controller.observe(_report(0))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        controller.observe(_report(10))
    with pytest.raises(ControllerError, match="weight entry 1 is not decided yet"):
        controller.entry(1)


def test_a_gap_in_the_log_is_refused(tmp_path: Path) -> None:
    controller = Controller(_plan(tmp_path))
    with pytest.raises(ControllerError, match="report of step 20 came while decision 0 is still"):
        controller.observe(_report(20))


def test_a_replay_serves_the_other_runs_entries_unchanged(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    controller = Controller(plan)
    for step in (0, 10):
        controller.observe(_report(step))
    open_replay = functools.partial(ReplayController, plan.log_path, NAMES)
    replay = pickle.loads(pickle.dumps(open_replay))()
    replay.observe(_report(20))
    assert [replay.entry(i) for i in range(2)] == list(controller.log.entries)
    with pytest.raises(ControllerError, match="has 2 entries and entry 2 is asked for"):
        replay.entry(2)


@pytest.fixture
def name(ray_cluster: None) -> Iterator[str]:
    """A controller name of one's own, free again afterwards."""
    name = f"controller-{uuid.uuid4().hex[:8]}"
    yield name
    stop_controller(name, namespace="controllers")


def _client(name: str, *, deadline_s: float = 120.0) -> RayControllerClient:
    factory = functools.partial(
        open_controller, name, namespace="controllers", deadline_s=deadline_s
    )
    return pickle.loads(pickle.dumps(factory))()


def _start(plan: ControllerPlan, name: str) -> Any:
    return start_controller(plan, name=name, namespace="controllers", deadline_s=120)


def _process_of(handle: Any) -> psutil.Process:
    """The process in which a controller lives."""
    return psutil.Process(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())))


def test_the_actor_survives_a_kill_between_reports_and_decides_as_if_undisturbed(
    name: str, tmp_path: Path
) -> None:
    plan = _plan(tmp_path)
    handle = _start(plan, name)
    client = _client(name)
    client.observe(_report(0))
    client.observe(_report(10))
    assert client.entry(1).decided_at == 10
    process = _process_of(handle)
    os.kill(process.pid, signal.SIGKILL)
    client.observe(_report(10, shift=0.1))
    client.observe(_report(20))
    alone = _undisturbed(tmp_path, steps=(0, 10, 20))
    assert tuple(client.entry(i) for i in range(3)) == alone == _entries(plan)
    assert _process_of(handle) != process


def test_a_waiting_student_gets_its_entry_as_soon_as_it_is_decided(
    name: str, tmp_path: Path
) -> None:
    handle = _start(_plan(tmp_path), name)
    client, got = _client(name), []
    client.observe(_report(0))
    client.entry(0)
    waiting = threading.Thread(target=lambda: got.append(client.entry(1)))
    waiting.start()
    time.sleep(1.0)
    assert not got
    client.observe(_report(10))
    handed_over = time.monotonic()
    waiting.join(timeout=60)
    assert got[0].effective_from == 12
    assert time.monotonic() - handed_over < 4.0  # less than one long poll
    del handle


def test_a_look_at_an_entry_never_waits_and_finds_what_is_decided(
    name: str, tmp_path: Path
) -> None:
    client = _client(name)
    assert client.peek(0) is None  # nobody is there
    handle = _start(_plan(tmp_path), name)
    client.observe(_report(0))
    looked_ms, found = [], None
    while found is None and len(looked_ms) < 3000:
        start = time.perf_counter()
        found = client.peek(0)
        looked_ms.append(1000 * (time.perf_counter() - start))
        time.sleep(0.01)
    assert statistics.median(looked_ms) < IMMEDIATELY_MS
    assert found == client.entry(0)
    process = _process_of(handle)
    process.suspend()
    try:
        assert _hand_over(client, _report(10)) < IMMEDIATELY_MS
        assert client.peek(1) is None
    finally:
        process.resume()
    assert client.entry(1).decided_at == 10
    del handle


@pytest.mark.drill
def test_a_student_that_waits_through_a_kill_still_gets_its_entry(
    name: str, tmp_path: Path
) -> None:
    handle = _start(_plan(tmp_path), name)
    client, got = _client(name), []
    client.observe(_report(0))
    client.entry(0)
    waiting = threading.Thread(target=lambda: got.append(client.entry(1)))
    waiting.start()
    time.sleep(0.5)
    process = _process_of(handle)
    os.kill(process.pid, signal.SIGKILL)
    client.observe(_report(10))
    waiting.join(timeout=120)
    assert got == list(_entries(_plan(tmp_path))[1:])
    del handle


def test_an_undecided_entry_is_a_sentence_after_the_deadline(name: str, tmp_path: Path) -> None:
    handle = _start(_plan(tmp_path), name)
    start = time.monotonic()
    sentence = r"did not decide weight entry 0 within 1 s \(it has no such entry yet\)"
    with pytest.raises(ControllerError, match=sentence):
        _client(name, deadline_s=1.0).entry(0)
    assert 0.9 < time.monotonic() - start < 20
    del handle


def _hand_over(client: RayControllerClient, report: DomainReport) -> float:
    """Milliseconds that a student loses when it hands a report over."""
    start = time.perf_counter()
    client.observe(report)
    return 1000 * (time.perf_counter() - start)


@pytest.mark.drill
def test_a_report_to_a_killed_controller_costs_nothing_and_is_decided_once_it_is_back(
    name: str, tmp_path: Path
) -> None:
    handle = _start(_plan(tmp_path), name)
    client = _client(name)
    assert _hand_over(client, _report(0)) < IMMEDIATELY_MS
    assert client.entry(0).weights == pytest.approx(NATURAL, abs=1e-15)
    process = _process_of(handle)
    os.kill(process.pid, signal.SIGKILL)
    assert _hand_over(client, _report(10)) < IMMEDIATELY_MS
    assert _hand_over(client, _report(20)) < IMMEDIATELY_MS
    assert tuple(client.entry(i) for i in range(3)) == _undisturbed(tmp_path, steps=(0, 10, 20))
    del handle


def test_an_absent_controller_costs_nothing_until_its_entry_is_needed(name: str) -> None:
    client = _client(name, deadline_s=0.5)
    assert _hand_over(client, _report(0)) < IMMEDIATELY_MS
    for _ in range(2):
        with pytest.raises(
            ControllerError, match=r"did not take the report of step 0 within 0.5 s"
        ):
            client.entry(0)


def test_a_report_handed_over_before_the_controller_starts_is_decided(
    name: str, tmp_path: Path
) -> None:
    client = _client(name)
    client.observe(_report(0))
    handle = _start(_plan(tmp_path), name)
    assert client.entry(0) == _entries(_plan(tmp_path))[0]
    del handle


@pytest.mark.drill
def test_a_controller_that_hangs_for_a_while_costs_the_student_only_its_wait_for_the_entry(
    name: str, tmp_path: Path
) -> None:
    handle = _start(_plan(tmp_path), name)
    client = _client(name)
    process = _process_of(handle)
    process.suspend()
    wake = threading.Timer(2.0, process.resume)
    wake.start()
    start = time.monotonic()
    assert _hand_over(client, _report(0)) < IMMEDIATELY_MS
    assert client.entry(0) == _entries(_plan(tmp_path))[0]
    assert time.monotonic() - start > 1.8
    wake.join()
    del handle


def test_a_hanging_controller_is_a_sentence_after_the_deadline(name: str, tmp_path: Path) -> None:
    handle = _start(_plan(tmp_path), name)
    client = _client(name, deadline_s=1.0)
    process = _process_of(handle)
    process.suspend()
    try:
        client.observe(_report(0))
        with pytest.raises(ControllerError, match="not take the report of step 0 within 1 s"):
            client.entry(0)
    finally:
        process.resume()
    del handle


def test_a_report_that_is_not_finite_arrives_as_its_own_error(name: str, tmp_path: Path) -> None:
    handle = _start(_plan(tmp_path), name)
    client = _client(name)
    client.observe(DomainReport(0, (float("nan"),) * 3, (1, 1, 1), (1.0,) * 3))
    with pytest.raises(NonFiniteLossError, match="student's validation perplexity") as caught:
        client.entry(0)
    assert type(caught.value) is NonFiniteLossError
    del handle


def test_a_second_start_replaces_the_first_and_continues_its_log(name: str, tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    first = _start(plan, name)
    client = _client(name)
    client.observe(_report(0))
    client.entry(0)
    second = _start(plan, name)
    client.observe(_report(10))
    assert (client.entry(0), client.entry(1)) == _entries(plan)
    stop_controller(name, namespace="controllers")
    stop_controller(name, namespace="controllers")
    Path(plan.log_path).unlink()
    third = _start(plan, name)
    with pytest.raises(ControllerError):
        _client(name, deadline_s=0.5).entry(0)
    del first, second, third
