"""The pool under kills, poison, silence and impostors."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import numpy as np
import pytest

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, TeacherError
from shared.store.readers import RecordingReader
from teacher_service.engine.audit import load_engine
from teacher_service.service import pool as pools
from teacher_service.service import roster, service
from teacher_service.service.pool import open_pool
from teacher_service.service.scaling.demand import Report
from tests.answers import decoded, question_of
from tests.teacher_service.scripted import Scripted, invented, make_rows
from tests.tiny import VOCAB

SPEC = question_of(top_k=4, shared_vocab=100)
POISON = 2  # below every id of make_rows


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"pool-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def started(name: str, engine: Scripted, *, replicas: int = 1, **settings):
    """A scripted service and a pool on it."""
    teacher = Teacher(model="any", cpus=0.1, replicas=replicas)
    described = service.start(name, teacher, detached=False, make_engine=engine).described()
    return open_pool(0, service=name, teacher=described.fingerprint, **settings)


def units(count: int) -> list[Rows]:
    return [make_rows([[10], [7]], first=2 * index, seed=index) for index in range(count)]


def poisoned(rows: Rows) -> Rows:
    ids = [row.copy() for row in rows.column("input_ids")]
    ids[0][3] = POISON
    return Rows.build(
        domains=rows.domains(),
        indices=rows.table.column("index").to_pylist(),
        input_ids=ids,
        doc_starts=rows.column("doc_starts"),
        loss_masks=rows.column("loss_mask"),
    )


def assert_all_once_and_in_order(pool, asked: list[Rows]) -> None:
    for rows in asked:
        assert pool.next().table.equals(invented(rows, SPEC).table, check_metadata=True)
    assert pool.stats.units == len(asked)


def test_submitting_never_blocks_and_answers_keep_their_order(name):
    pool, asked = started(name, Scripted(delay_s=0.1), replicas=2), units(10)
    before = time.monotonic()
    for rows in asked:
        pool.submit(rows, SPEC)
    assert time.monotonic() - before < 0.5
    assert_all_once_and_in_order(pool, asked)
    assert pool.stats.retried_units == 0
    assert 0.3 < pool.stats.wait_s < time.monotonic() - before


def test_a_long_wait_is_said_with_what_is_waited_for(name, monkeypatch):
    monkeypatch.setattr(pools, "SAY_S", 0.1)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        raise OSError("no space left")

    pool, asked = started(name, Scripted(delay_s=1.0), say=say), units(1)
    pool.submit(asked[0], SPEC)
    assert_all_once_and_in_order(pool, asked)
    names = ", ".join(asked[0].names())
    assert f"teacher service {name} has not answered for rows {names} for " in said[0]
    assert said[0].endswith("1 replica at work; it is waited for up to 600 s")


def test_what_a_store_has_is_neither_waited_for_nor_under_way(name, tmp_path):
    """So that a teacher behind it is not asked for more replicas, and in the end has its fewest."""
    pool, asked = started(name, Scripted(delay_s=0.1)), units(4)
    reader = RecordingReader(pool, tmp_path, teacher=Scripted().describe().fingerprint)

    def learnt() -> Report:
        for rows in asked:
            reader.submit(rows, SPEC)
        for rows in asked:
            assert reader.next().table.equals(invented(rows, SPEC).table)
        return pool.report()

    cold, warm = learnt(), learnt()
    assert cold.wait_s > 0.1
    assert cold.most_units == 3
    assert warm.wait_s == cold.wait_s
    assert warm.most_units == warm.units == 0


@pytest.mark.drill
def test_the_most_units_under_way_are_reported_whatever_the_moment(name, monkeypatch):
    """Those that are answered and not taken were under way a moment before: replicas that answer
    together would seem to be enough for all there is."""
    pool, asked = started(name, Scripted(delay_s=0.1), replicas=2, in_flight=4), units(8)
    monkeypatch.setattr(roster, "REPORT_S", 600.0)  # this test reports in its place
    for rows in asked:
        pool.submit(rows, SPEC)
    time.sleep(1.0)
    pool.next()  # takes in what has come
    report = pool.report()
    assert report.most_units == 4
    assert report.units < 4
    assert pool.report().most_units == report.units
    pool.close()


@pytest.mark.drill
def test_a_replica_killed_in_mid_unit_costs_nothing_but_time(name, tiny_pair):
    """Real engines: every unit arrives once, in order, with the bits of the undisturbed run."""
    teacher = Teacher(model=str(tiny_pair.teacher), cpus=0.5, replicas=2)
    described = service.start(name, teacher, detached=False).described()
    engine, spec = load_engine(teacher), question_of(32, VOCAB)
    asked = [make_rows([[60, 60]] * 8, vocab=VOCAB, seed=n, first=8 * n) for n in range(40)]
    pool = open_pool(0, service=name, teacher=described.fingerprint)
    for rows in asked:
        pool.submit(rows, spec)
    answers = [pool.next() for _ in range(5)]
    os.kill(service.status(name).replicas[0].health.pid, signal.SIGKILL)
    answers += [pool.next() for _ in range(35)]
    for rows, answer in zip(asked, answers, strict=True):
        assert answer.table.equals(engine.score(rows, spec).table, check_metadata=True)
    assert pool.stats.retried_units > 0
    deadline = time.monotonic() + 60
    while service.status(name).replicas[0].restarts == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [r.restarts for r in service.status(name).replicas] == [1, 0]


@pytest.mark.drill
def test_the_only_replica_comes_back_and_is_waited_for(name, tmp_path):
    pool = started(name, Scripted(killed_once=str(tmp_path / "killed")), unit_deadline_s=60)
    asked = units(5)
    for rows in asked:
        pool.submit(rows, SPEC)
    assert_all_once_and_in_order(pool, asked)
    assert pool.stats.retried_units > 0


def test_a_unit_that_is_sent_again_names_the_same_ids(name, tmp_path):
    pool = started(name, Scripted(killed_once=str(tmp_path / "killed")), unit_deadline_s=60)
    spec, (plain,) = question_of(top_k=4, shared_vocab=100, student_ids=2), units(1)
    rows = plain.with_student_ids(np.arange(2 * 15).reshape(15, 2))
    pool.submit(rows, spec)
    assert pool.next().table.equals(invented(rows, spec).table, check_metadata=True)
    assert pool.stats.retried_units > 0


def test_a_row_that_kills_every_replica_stops_the_run_by_name(name):
    pool, asked = started(name, Scripted(killed_by=POISON), replicas=2), units(6)
    asked[2] = poisoned(asked[2])
    for rows in asked:
        pool.submit(rows, SPEC)
    assert_all_once_and_in_order(pool, asked[:2])
    with pytest.raises(TeacherError, match=r"failed 3 times on the unit of rows text/4, text/5;"):
        pool.next()


def test_a_unit_that_fails_everywhere_stops_the_run_with_the_reason(name):
    pool, (rows,) = started(name, Scripted(fails_on=POISON), replicas=2), units(1)
    pool.submit(poisoned(rows), SPEC)
    with pytest.raises(TeacherError, match=r"rows text/0, text/1; .* MemoryError: out of every"):
        pool.next()
    assert pool.stats.retried_units == 3


def test_what_failed_on_one_replica_is_asked_of_another(name, tmp_path):
    """Sent to the same one again it would fail once too often."""
    engine = Scripted(fails_first=str(tmp_path / "first"))
    pool, asked = started(name, engine, replicas=2, max_unit_failures=2), units(1)
    pool.submit(asked[0], SPEC)
    assert_all_once_and_in_order(pool, asked)
    assert pool.stats.retried_units == 1


def test_a_question_that_cannot_be_answered_is_not_retried(name):
    pool, (rows,) = started(name, Scripted(refuses=POISON)), units(1)
    pool.submit(poisoned(rows), SPEC)
    with pytest.raises(ConfigError, match="token 2 is refused"):
        pool.next()
    assert pool.stats.retried_units == 0


def test_a_silent_replica_is_passed_over(name, tmp_path):
    pool = started(name, Scripted(hangs_once=str(tmp_path / "hung")), replicas=2, unit_deadline_s=5)
    asked = units(6)
    for rows in asked:
        pool.submit(rows, SPEC)
    assert_all_once_and_in_order(pool, asked)


def test_when_nobody_answers_the_deadline_is_a_sentence(name):
    pool, (rows,) = started(name, Scripted(delay_s=60), unit_deadline_s=2), units(1)
    pool.submit(rows, SPEC)
    with pytest.raises(TeacherError, match=r"answered for rows text/0, text/1 within 2 s; see"):
        pool.next()


def test_another_teacher_than_the_run_began_with_is_refused(name):
    started(name, Scripted())
    pool, (rows,) = open_pool(0, service=name, teacher={"model": "else"}), units(1)
    pool.submit(rows, SPEC)
    with pytest.raises(TeacherError, match="comes from another teacher"):
        pool.next()


@pytest.mark.drill
def test_a_service_that_restarts_is_found_again(name):
    pool, asked = started(name, Scripted(), unit_deadline_s=60), units(2)
    pool.submit(asked[0], SPEC)
    pool.next()
    service.stop(name)
    pool.submit(asked[1], SPEC)
    service.start(
        name, Teacher(model="any", cpus=0.1), detached=False, make_engine=Scripted()
    ).described()
    assert pool.next().table.equals(invented(asked[1], SPEC).table)


def test_an_own_service_that_is_gone_is_not_waited_for(name):
    pool, asked = started(name, Scripted(delay_s=60), own=True), units(2)
    pool.submit(asked[0], SPEC)
    service.stop(name)
    with pytest.raises(TeacherError, match=f"service {name} is gone; this command started it"):
        pool.next()
    pool.submit(asked[1], SPEC)
    with pytest.raises(TeacherError, match="is gone"):
        pool.next()


def test_a_closed_pool_leaves_the_replica_to_others(name):
    pool, asked = started(name, Scripted(delay_s=0.5), in_flight=10), units(10)
    for rows in asked:
        pool.submit(rows, SPEC)
    pool.close()
    other, before = open_pool(1, service=name), time.monotonic()
    other.submit(asked[0], SPEC)
    np.testing.assert_array_equal(decoded(other.next()).ids_NK, decoded(invented(asked[0], SPEC)).ids_NK)  # fmt: skip  # noqa: E501
    assert time.monotonic() - before < 3


def test_a_pool_asked_apart_reports_what_others_wait_for_its_answers(name):
    """A thread that waits for answers while others work keeps nobody waiting, and those who wait
    for a thread that does something else do not wait for this service."""
    pool, asked = started(name, Scripted(delay_s=0.2), apart=True), units(4)
    for rows in asked[:3]:
        pool.submit(rows, SPEC)
    assert_all_once_and_in_order(pool, asked[:3])
    with pool.waiting():
        time.sleep(0.1)
    assert pool.report().wait_s == 0
    pool.submit(asked[3], SPEC)
    with pool.waiting():
        pool.next()
    assert 0.1 <= pool.report().wait_s < pool.stats.wait_s


def test_who_waits_for_a_pool_that_is_closed_hears_it(name):
    pool = started(name, Scripted(delay_s=30.0))
    pool.submit(units(1)[0], SPEC)
    threading.Timer(0.2, pool.close).start()
    with pytest.raises(TeacherError, match="nobody waits for answers any more"):
        pool.next()
    with pytest.raises(TeacherError, match="the run has ended"):
        pool.submit(units(1)[0], SPEC)
