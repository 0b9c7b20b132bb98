"""Ray Train's trainer for workers that bring torch themselves.

`ray.train.torch` imports torch in the driver and in Ray Train's controller, which need none. Here
workers are told where to meet, and open the process group themselves.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train import Result
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

LEAVE_S = 30.0
ABORT_S = 30.0  # a group that is just coming up is ended when it is up
RAY_NODE_ID_KEY = "ray.io/node-id"


class WorkerGroup(DataParallelTrainer):
    """One attempt at a training; `fit` runs it, from any thread."""

    _controller: Any = None  # Ray Train's, once `fit` has started it

    def stop(self) -> None:
        """End the attempt from another thread, with its workers and their places."""
        if self._controller is not None:
            ray.wait([self._controller.abort.remote()], timeout=ABORT_S)
            ray.kill(self._controller, no_restart=True)

    def _create_default_callbacks(self) -> list[Any]:
        # Each is a process of its own. The one removes a placement group whose controller died,
        # which Ray does at the end of the command; the other serves Ray Data.
        needless = (PlacementGroupCleanerCallback, DatasetsCallback)
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, needless)]

    def _initialize_and_run_controller(self, **built: Any) -> Result:
        """As in Ray Train, with the handle kept; Ctrl-C is for the command that runs this."""
        actor: Any = ray.remote(
            num_cpus=0,
            label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
            runtime_env={"env_vars": get_env_vars_to_propagate()},
        )(TrainController)
        policy = _AsAsked(scaling_config=self.scaling_config)
        self._controller = actor.remote(**built | {"scaling_policy": policy})
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())


class _AsAsked(FixedScalingPolicy):
    """As many workers as asked for. Nothing is asked of an autoscaler, which would be one more
    process: what a cluster has no room for is refused before."""

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
