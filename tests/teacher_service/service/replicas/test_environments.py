"""The process of an engine in an environment of its own, where it does not answer."""

import time

import pytest
import ray

from shared.errors import TeacherError
from teacher_service.service.replicas import environments
from teacher_service.service.replicas.environments import Worker


class Slow:
    """An engine that answers nothing in time."""

    def sleep(self) -> None:
        time.sleep(60)


def test_a_process_that_does_not_answer_is_ended(ray_cluster, monkeypatch):
    monkeypatch.setattr(environments, "DEADLINE_S", 0.1)
    worker = object.__new__(Worker)  # what it is made of needs vLLM
    worker._actor = ray.remote(Slow).options(num_cpus=0).remote()
    with pytest.raises(TeacherError, match=r"did not answer within 0\.1 s; start it again"):
        worker("sleep")
    monkeypatch.setattr(environments, "DEADLINE_S", 30.0)
    with pytest.raises(TeacherError, match="process died"):
        worker("sleep")
