"""Ray Train's trainer for workers that bring torch themselves.

`ray.train.torch` imports torch in the driver, which needs none. Here workers are told where to
meet, and open the process group themselves. Ray Train's controller runs in the driver, in the
thread that calls `fit`, and there is no actor for its reports and barriers, which workers do not
call: each would be a process more to start.
"""

import asyncio
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train import Result, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import AbortedState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

LEAVE_S = 30.0


class Size(Protocol):
    """What decides how many workers a group has, and hears of them; called by Ray Train's loop."""

    def choose(self) -> int:
        """How many workers are placed next."""
        ...

    def up(self, nodes: Sequence[str]) -> None:
        """Workers are up, on these nodes, one for each."""
        ...

    def down(self) -> None:
        """They end."""
        ...


class WorkerGroup(DataParallelTrainer):
    """One attempt at a training; `fit` runs it, from any thread."""

    def __init__(self, *arguments: Any, size: Size, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ended, self._size = threading.Event(), size

    def stop(self) -> None:
        """End the attempt from another thread, with its workers and their places; a group that is
        just coming up is ended when it is up."""
        self._ended.set()

    def _create_default_callbacks(self) -> list[Any]:
        # Each is a process of its own. The one removes a placement group whose controller died,
        # which Ray does at the end of the command; the other serves Ray Data.
        needless = (PlacementGroupCleanerCallback, DatasetsCallback)
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if not isinstance(callback, needless)]
        return [*kept, _Told(self._size)]

    def _initialize_and_run_controller(self, **built: Any) -> Result:
        policy = _AsChosen(self.scaling_config, self._size)
        controller = _Controller(self._ended, **built | {"scaling_policy": policy})
        asyncio.run(controller.run())
        return controller.get_result()


class _NoMeetingPoint:
    """In place of the actor by which workers of Ray Train report and wait for each other."""

    def options(self, **_: Any) -> "_NoMeetingPoint":
        """Itself, as `remote` is."""
        return self

    remote = options


worker_group.SynchronizationActor = _NoMeetingPoint()  # type: ignore[assignment]
state._shutdown_sync_actor = lambda sync_actor: None


class _Workers(worker_group.WorkerGroup):
    """Ray Train's group, for a controller that is no actor. Workers have the environment of every
    process of the job: one of their own would have each started twice."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As in Ray Train, without a handle to the controller, of which nobody here asks."""
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[rank] for name, values in train_context_args.items()},
            )
            for rank, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    """Ray Train's loop around a group of workers, which ends early when it is told to."""

    worker_group_cls = _Workers

    def __init__(self, ended: threading.Event, **built: Any) -> None:
        super().__init__(**built)
        self._ended = ended

    async def _run_control_loop_iteration(self) -> None:
        if not self._ended.is_set():
            await super()._run_control_loop_iteration()
            return
        if (group := self.get_worker_group()) and group.has_started():
            group.abort()
        self._set_state(AbortedState())


class _Told(WorkerGroupCallback):
    """Tells of workers that come and go."""

    def __init__(self, size: Size) -> None:
        self._size = size

    def after_worker_group_start(self, worker_group: worker_group.WorkerGroup) -> None:
        """Tell on which nodes they are."""
        self._size.up([worker.metadata.node_id for worker in worker_group.get_workers()])

    def before_worker_group_shutdown(self, worker_group: worker_group.WorkerGroup) -> None:
        """Tell that they end."""
        self._size.down()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        """Tell that they end."""
        self._size.down()


class _AsChosen(FixedScalingPolicy):
    """As many workers as chosen whenever they are placed. Nothing is asked of an autoscaler, which
    would be one more process: what a cluster has no room for is refused before."""

    def __init__(self, scaling_config: ScalingConfig, size: Size) -> None:
        super().__init__(scaling_config)
        self._size = size

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        """See Ray Train."""
        bundle: Any = self.scaling_config._resources_per_worker_not_none
        return ResizeDecision(num_workers=self._size.choose(), resources_per_worker=bundle)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nobody is told."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody is asked."""


@dataclass
class Meeting(BackendConfig):
    """The process group of torch, which workers join through the environment."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls around a group of workers."""
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_tell, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) < 2:
            return
        try:
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_S)
        except GetTimeoutError:
            return  # a rank that is gone; the others are ended with their processes


def _tell(address: str, port: int) -> None:
    """Describe the group as torch reads it."""
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
