"""The ranks of a replica that is spread over several processes.

The leader, rank 0, is the replica that clients know. It makes the other ranks in its own placement
group, gives each of them every unit that it works on, and watches them: one that dies, fails or
falls out of step ends the leader too, whose restart makes the whole group anew.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shared.data.rows import Rows
from shared.errors import TeacherError, TutelageError
from shared.run.threads import use_threads
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from teacher_service.engine.description import Engine, MakeEngine
from teacher_service.service.replicas.naming import (
    Request,
    find_actor,
    rank_name,
    service_of,
)

OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "concurrency_groups": {"compute": 1, "control": 2},
}
IN_STEP_S = 300.0  # between the end of a unit on the leader and on the others
END_S = 0.5  # until what a failed unit raises has left the process
FREE_S = 60.0  # until the names of ranks that were killed are free
T = TypeVar("T")

log = logging.getLogger(__name__)


def enter(store: Any, rank: int, size: int, *, on_gpu: bool) -> None:
    """Make this process, which has not used torch yet, a rank of a group."""
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes a GPU that it sees
    from teacher_service.engine.tensor_parallel import join  # slow, as torch is

    join(store, rank, size, on_gpu=on_gpu)


@ray.remote(**OPTIONS)
class TeacherRank:
    """A rank that does not lead: it holds its part of the teacher and takes part in every unit."""

    def __init__(self, request: Request, rank: int, host: str, port: int) -> None:
        use_threads(request.teacher.rank_cpus)
        self._name = ray.get_runtime_context().get_actor_name() or ""
        self._failure: TutelageError | None = None
        from teacher_service.engine.tensor_parallel import leave, reach

        size, on_gpu = request.teacher.tensor_parallel, request.teacher.gpus > 0
        enter(reach(host, port), rank, size, on_gpu=on_gpu)
        try:
            self._engine = cloudpickle.loads(request.make_engine)()
        except TutelageError as error:
            self._failure = error
            leave()  # so that nobody waits for this process

    def __repr__(self) -> str:
        return self._name

    @ray.method(concurrency_group="compute")
    def take_part(self, call: str, *args: Any) -> bool:
        """Do what the leader does; whether it was answered, not refused. An error of another kind
        ends the process, since others may be waiting for it."""
        if self._failure is not None:
            return False
        try:
            CALLS[call](self._engine, *args)
        except TutelageError:
            return False
        except Exception:
            log.exception("%s fails", self._name)
            os._exit(1)
        return True

    @ray.method(concurrency_group="control")
    def failure(self) -> TutelageError | None:
        """Why it could not load its part."""
        return self._failure

    @ray.method(concurrency_group="control")
    def stay(self) -> None:
        """Never returns; fails when the process dies."""
        threading.Event().wait()


def _score(engine: Any, table: pa.Table, spec: dict[str, Any]) -> None:
    engine.score(Rows(table), Question.from_dict(spec))


def _generate(engine: Any, table: pa.Table, spec: dict[str, Any]) -> None:
    engine.generate(Openings(table), GenerationSpec.from_dict(spec))


def _ship_head(engine: Any) -> None:
    engine.head.whole()  # its rows go to the leader, who writes them


CALLS: dict[str, Callable[..., None]] = {
    "score": _score,
    "generate": _generate,
    "ship_head": _ship_head,
}


class Ranks:
    """The other ranks, as the leader sees them."""

    def __init__(self, leader: str, request: Request) -> None:
        self._leader, self._request = leader, request
        self._actors: list[Any] = []
        self._ending = threading.Event()

    def load(self, make_engine: MakeEngine) -> Engine:
        """Make the ranks and load the engine together with them. Raises the UserError that loading
        raised on any of them."""
        try:
            self._begin()
            return make_engine()
        except TutelageError:
            raise
        except Exception as error:  # as where a rank left the group
            raise self._why_not_loaded(error) from error

    def _begin(self) -> None:
        from teacher_service.engine.tensor_parallel import listen

        teacher, host = self._request.teacher, ray.util.get_node_ip_address()
        store, port = listen(host)
        self._actors = [self._made(rank, host, port) for rank in range(1, teacher.tensor_parallel)]
        stays = [actor.stay.remote() for actor in self._actors]
        threading.Thread(target=self._watch, args=(stays,), daemon=True).start()
        enter(store, 0, teacher.tensor_parallel, on_gpu=teacher.gpus > 0)

    def together(self, own: Callable[[], T], call: str, *args: Any) -> T:
        """What the leader's own part gives, done in step with the others. Raises what it raises."""
        if self._ending.is_set():
            raise TeacherError(f"the processes of {self._leader} are about to be started again")
        others = [actor.take_part.remote(call, *args) for actor in self._actors]
        try:
            answer = own()
        except TutelageError:
            self._check_step(others, answered=False)
            raise
        except Exception as error:
            self._end_soon(f"{type(error).__name__} in a unit")
            raise
        self._check_step(others, answered=True)
        return answer

    def _why_not_loaded(self, error: Exception) -> TutelageError:
        """Why a rank could not load its part; if none says, the group ends."""
        with suppress(RayError):
            for told in ray.get([a.failure.remote() for a in self._actors], timeout=IN_STEP_S):
                if told is not None:
                    return told
        return self.end(f"it cannot be loaded: {error}")

    def end(self, why: str) -> NoReturn:
        """End this process and its ranks, to be started again."""
        log.error("%s starts again with its ranks: %s", self._leader, why)
        for actor in self._actors:
            with suppress(RayError):
                ray.kill(actor, no_restart=True)
        os._exit(1)

    def _check_step(self, others: list[Any], *, answered: bool) -> None:
        """Raise TeacherError unless all ranks did what the leader did."""
        try:
            agreed = all(one == answered for one in ray.get(others, timeout=IN_STEP_S))
        except (GetTimeoutError, RayError):
            agreed = False
        if not agreed:
            self._end_soon("its ranks are out of step")
            raise TeacherError(f"the ranks of {self._leader} are out of step")

    def _end_soon(self, why: str) -> None:
        self._ending.set()
        threading.Timer(END_S, self.end, args=(why,)).start()

    def _watch(self, stays: list[Any]) -> None:
        """Whatever the leader waits for, it is not answered without all ranks."""
        (gone, *_), _ = ray.wait(stays, num_returns=1)
        self.end(f"rank {1 + stays.index(gone)} died")

    def _made(self, rank: int, host: str, port: int) -> Any:
        """A rank in its place, after the one that had its name."""
        request, name = self._request, rank_name(self._leader, rank)
        service = service_of(self._leader)
        if (before := find_actor(service, name)) is not None:
            ray.kill(before, no_restart=True)
        group = ray.util.get_current_placement_group()
        assert group is not None, "a replica is made in a placement group"
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        deadline = time.monotonic() + FREE_S
        while True:
            try:
                return TeacherRank.options(  # type: ignore[attr-defined]
                    **request.actor_options(service, name),
                    scheduling_strategy=place,
                ).remote(request, rank, host, port)
            except ValueError:  # the name is not free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
