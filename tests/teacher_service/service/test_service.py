"""The service as a driver sees it: start, scale, refuse, stop."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from uuid import uuid4

import numpy as np
import pytest
import ray

from cluster.cli import main
from cluster.launch.teachers.watch import using
from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, PlacementError, TeacherError, TutelageError
from shared.run.run_dir import RunDir
from teacher_service.engine.audit import load_engine
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from teacher_service.service.replicas.naming import replica_name
from tests.answers import question_of
from tests.teacher_service.scripted import Scripted, Threaded, invented, make_rows
from tests.tiny import VOCAB

ANY = Teacher(model="any", cpus=0.1)
SPEC = question_of(top_k=4, shared_vocab=100)


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"service-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def groups_of(name: str) -> list[str]:
    table = ray.util.placement_group_table().values()
    return [g["name"] for g in table if name in g["name"] and g["state"] != "REMOVED"]


def test_remote_answers_equal_those_in_process_bit_for_bit(name, tiny_pair):
    teacher = Teacher(model=str(tiny_pair.teacher), cpus=0.5)
    described = service.start(name, teacher, detached=False).described()
    engine = load_engine(teacher)
    assert described == engine.describe()
    rows = make_rows([[20, 9], [31], [2, 40]], vocab=VOCAB)
    spec = question_of(top_k=VOCAB, shared_vocab=VOCAB, encoding="fp32", hidden_layers=(1, 3))
    pool = open_pool(0, service=name, teacher=described.fingerprint)
    pool.submit(rows, spec)
    answer = pool.next()
    assert answer.table.equals(engine.score(rows, spec).table, check_metadata=True)
    assert pool.stats.wire_bytes == answer.num_bytes


def test_starting_twice_is_once_and_another_teacher_is_refused(name):
    make = Scripted()
    first = service.start(name, ANY, detached=True, make_engine=make).described()
    before = service.status(name)
    assert service.start(name, ANY, detached=True, make_engine=make).described() == first
    assert service.status(name).replicas[0].incarnation == before.replicas[0].incarnation
    other = ANY.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=f"{name} already serves any with other settings"):
        service.start(name, other, detached=True, make_engine=make).described()
    assert service.stop(name)
    assert service.start(name, other, detached=True, make_engine=make).described() == first


def test_replicas_come_and_go_while_a_client_works(name):
    described = service.start(
        name, ANY, detached=True, make_engine=Scripted(delay_s=0.05)
    ).described()
    pool = open_pool(0, service=name, teacher=described.fingerprint)
    units = [make_rows([[10]], first=index, seed=index) for index in range(100)]
    fed, answers = iter(units), []

    def work(seconds: float) -> None:
        """Keep the pool busy as a trainer does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(answers) < len(units):
            while pool_depth[0] < 6 and (unit := next(fed, None)) is not None:
                pool.submit(unit, SPEC)
                pool_depth[0] += 1
            answers.append(pool.next())
            pool_depth[0] -= 1

    pool_depth = [0]
    work(0.5)
    assert service.scale(name, 2) == 1
    counted = {}
    while len(answers) < len(units) - 40 and (len(counted) < 2 or not min(counted.values())):
        work(0.5)
        counted = {r.name: r.health.units for r in service.status(name).replicas}
    assert len(counted) == 2
    assert min(counted.values()) > 0, "the second replica serves"
    drained = ray.remote(num_cpus=0)(service.scale).remote(name, 1)
    while len(answers) < len(units):
        work(1.0)
    assert ray.get(drained, timeout=60) == 2
    assert [r.name for r in service.status(name).replicas] == [replica_name(name, 0)]
    assert len(groups_of(name)) == 1
    for unit, answer in zip(units, answers, strict=True):
        assert answer.table.equals(invented(unit, SPEC).table)
    assert pool.stats.retried_units == 0, "draining loses nothing"


@pytest.mark.parametrize("wanted", [{"gpus": 2}, {"cpus": 100}, {"cpus": 5, "replicas": 2}])
def test_what_cannot_be_placed_is_said_within_ten_seconds(name, wanted):
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"replicas do not fit: each needs .* there was free"):
        service.start(
            name, Teacher(model="m", **wanted), detached=True, make_engine=Scripted()
        ).described()
    assert time.monotonic() - started < 10
    assert name not in service.list_services()
    assert not groups_of(name)


def test_growth_that_cannot_be_placed_leaves_the_service_of_three_threads_as_it_was(name):
    teacher = ANY.model_copy(update={"cpus": 3.0})
    described = service.start(name, teacher, detached=True, make_engine=Threaded()).described()
    assert described.fingerprint["threads"] == "3"
    before, started = service.status(name), time.monotonic()
    with pytest.raises(PlacementError, match="3 CPU"):
        service.scale(name, 9)
    assert time.monotonic() - started < 10
    assert [r.name for r in service.status(name).replicas] == [r.name for r in before.replicas]
    assert len(groups_of(name)) == 1


def test_a_teacher_that_cannot_be_loaded_is_refused_and_leaves_nothing(name, tmp_path):
    teacher = Teacher(model=str(tmp_path / "nothing"), cpus=0.1)
    with pytest.raises(ConfigError, match="nothing does not exist"):
        service.start(name, teacher, detached=True).described()
    assert name not in service.list_services()
    with pytest.raises(TutelageError, match="died"):
        service.start(name, ANY, detached=True, make_engine=partial(int, "no engine")).described()
    assert name not in service.list_services()


def test_a_half_dead_service_is_seen_and_removed(name):
    service.start(name, ANY, detached=True, make_engine=Scripted()).described()
    ray.kill(ray.get_actor("tutelage-registry", namespace=name))
    deadline = time.monotonic() + 30
    while service.status(name).teacher is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    left = service.status(name)
    assert (left.teacher, len(left.replicas)) == (None, 1)
    assert name in service.list_services()
    assert service.stop(name)
    assert name not in service.list_services()
    assert not service.stop(name)


def test_what_is_not_there_is_a_sentence(name):
    for call in (service.status, service.running, partial(service.scale, replicas=2)):
        with pytest.raises(ConfigError, match=f"no teacher service named {name} is running"):
            call(name)
    with pytest.raises(ConfigError, match="no teacher service named"):
        open_pool(0, service=name)


def test_health_answers_while_a_unit_is_scored(name):
    service.start(name, ANY, detached=True, make_engine=Scripted(delay_s=3.0)).described()
    replica = ray.get_actor(replica_name(name, 0), namespace=name)
    unit = replica.score.remote(make_rows([[5]]).table, SPEC.as_dict())
    time.sleep(0.5)
    for _ in range(3):
        assert ray.get(replica.health.remote(), timeout=2).units == 0
    assert not ray.wait([unit], timeout=0)[0]
    ray.get(unit)
    assert ray.get(replica.health.remote()).units == 1


def test_errors_keep_their_class_across_processes(name):
    service.start(name, ANY, detached=True, make_engine=Scripted(refuses=7, fails_on=8)).described()
    replica = ray.get_actor(replica_name(name, 0), namespace=name)
    for token, error in ((7, ConfigError), (8, TeacherError)):
        rows = Rows.build(
            domains=["text"],
            indices=[0],
            input_ids=[np.array([50, token, 51])],
            doc_starts=[np.zeros(1)],
            loss_masks=[np.array([1, 1, 0])],
        )
        with pytest.raises(error):
            ray.get(replica.score.remote(rows.table, SPEC.as_dict()))


def test_a_service_knows_who_uses_it(name):
    service.start(name, ANY, detached=True, make_engine=Scripted()).described()
    assert service.users(name) == []
    assert service.use(name, "runs/one")
    assert service.use(name, "runs/two")
    assert service.users(name) == ["runs/one", "runs/two"]
    service.leave(name, "runs/one")
    assert service.users(name) == ["runs/two"]
    service.stop(name)
    assert not service.use(name, "runs/two")
    assert service.users(name) == []


def test_a_service_that_is_used_is_not_stopped_and_one_that_is_gone_is_named(
    name, capsys, tmp_path
):
    service.start(name, ANY, detached=True, make_engine=Scripted()).described()
    user = str(tmp_path / "one")
    with using([name], RunDir(tmp_path / "one"), gone="start it again"):
        wait_until(lambda: service.users(name) == [user])
        assert main(["teacher", "down", "--service", name]) == 2
        refused = capsys.readouterr().err
        assert f"{name} is used by {user}; stop that first" in refused
        assert service.users(name) == [user]
        assert main(["teacher", "down", "--service", name, "--force"]) == 0
        said = capsys.readouterr().out
        assert f"{name} is used by {user}, which waits for it" in said
        heard = [""]

        def hears() -> bool:
            heard[0] += capsys.readouterr().out
            return f"teacher service {name} is gone; start it again" in heard[0]

        wait_until(hears)
    assert name not in service.list_services()


def wait_until(condition: Callable[[], bool], *, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
