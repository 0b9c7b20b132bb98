"""A replica of several ranks: placed together, answering as one, started again as one."""

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
import ray

from shared.config.models.teachers import Teacher
from shared.errors import HandshakeError, PlacementError
from teacher_service.engine.audit import load_engine
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from teacher_service.service.replicas.naming import is_part, is_replica, replica_name, replica_names
from tests.answers import decoded, question_of
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import save_family

SPEC = question_of(9, VOCAB, encoding="fp32", entropy=True)
RANK = "replica-0/rank-1"


@pytest.fixture
def name(ray_cluster) -> Iterator[str]:
    """A service name of its own, stopped afterwards."""
    name = f"ranks-{uuid4().hex[:8]}"
    yield name
    service.stop(name)


def actor_of(name: str, part: str) -> Any:
    return ray.get_actor(f"{name}/{part}", namespace=name)


def named_actors() -> list[Any]:
    return ray.util.list_named_actors(all_namespaces=True)


def test_a_rank_is_no_replica_and_belongs_to_its_service():
    leader, rank, other = (
        {"namespace": "a/replica-0/rank-1", "name": f"a/replica-0/rank-1/{part}"}
        for part in ("replica-0", "replica-0/rank-1", "registry")
    )
    assert (is_replica(leader), is_replica(rank), is_replica(other)) == (True, False, False)
    assert (is_part(leader), is_part(rank), is_part(other)) == (True, True, False)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
        ({"tensor_parallel": 2, "gpus": 1}, "is 2 and gpus 1, but each of its processes has one"),
        ({"tensor_parallel": 2, "quantisation": "nf4"}, "is 2 and quantisation nf4, whose"),
        ({"tensor_parallel": 2, "adapter": "mine"}, "is 2 and adapter mine, which is not split"),
    ],
)
def test_what_contradicts_several_processes_is_refused(asked, reason):
    with pytest.raises(ValueError, match=reason):
        Teacher(model="any", **asked)


def test_the_processes_of_a_replica_share_what_it_asks_for():
    teacher = Teacher(model="any", tensor_parallel=4, gpus=4, cpus=2)
    assert (teacher.rank_gpus, teacher.rank_cpus) == (1, 0.5)


def test_more_ranks_than_there_is_room_for_are_refused(name):
    teacher = Teacher(model="any", tensor_parallel=3, cpus=12)
    with pytest.raises(PlacementError, match=r"1 of 1 .* each needs 3 times 4 CPU"):
        service.start(name, teacher, detached=False)


@pytest.mark.drill
def test_a_replica_of_two_ranks_answers_as_one_and_starts_again_as_one(name, tmp_path):
    folder = str(save_family("llama", tmp_path))
    alone = load_engine(Teacher(model=folder))
    teacher = Teacher(model=folder, tensor_parallel=2, cpus=1)
    described = service.start(name, teacher, detached=True).described()
    own = alone.describe().fingerprint
    assert described.fingerprint == own | {"tensor_parallel": "2"}
    assert replica_names(name) == [replica_name(name, 0)]
    pool = open_pool(0, service=name, teacher=described.fingerprint, unit_deadline_s=300)
    rows = make_rows([[20, 9], [31], [2, 40]])

    def ask() -> pa.Table:
        pool.submit(rows, SPEC)
        answer = pool.next()
        expected, found = decoded(alone.score(rows, SPEC)), decoded(answer)
        np.testing.assert_array_equal(found.ids_NK, expected.ids_NK)
        np.testing.assert_allclose(found.logprobs_NK, expected.logprobs_NK, rtol=0, atol=1e-5)
        return answer.table

    first = ask()
    pool.submit(make_rows([[9]]), question_of(9, VOCAB + 1))
    with pytest.raises(HandshakeError, match="129 ids are asked for"):  # on every rank, in step
        pool.next()
    pool = open_pool(0, service=name, teacher=described.fingerprint, unit_deadline_s=300)
    assert ask().equals(first)
    (replica,) = service.status(name).replicas
    ray.kill(actor_of(name, RANK), no_restart=True)
    assert ask().equals(first)
    deadline = time.monotonic() + 60
    while (again := service.status(name).replicas[0]).incarnation == replica.incarnation:
        assert time.monotonic() < deadline, "the leader has not started again"
        time.sleep(0.2)
    assert again.state == "alive"
    assert service.stop(name)
    left = [actor for actor in named_actors() if actor["namespace"] == name]
    assert not left, "a rank outlives its service"
