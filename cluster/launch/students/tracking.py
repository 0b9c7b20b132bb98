"""A training in Ray's own Train tab, where the cluster has a dashboard that shows one.

Ray keeps such runs in an actor of the cluster, one process more, and asks now and then whether the
actor lives that manages a run. Here none does, so that the run's controller of the mixture stands
for it.
"""

import warnings
from typing import Any

import ray
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.state.state_manager import TrainStateManager
from ray.util.annotations import RayDeprecationWarning


def keeper_of(controller: str, *, namespace: str) -> str | None:
    """Id of a run's controller; None where there is none, or no dashboard."""
    from ray._private.worker import get_dashboard_url

    if not get_dashboard_url():
        return None
    try:
        actor: Any = ray.get_actor(controller, namespace=namespace)
    except ValueError:
        return None
    return actor._actor_id.hex()


class Tracking(StateManagerCallback):
    """Ray Train's own, for a training that no actor manages; `keeper` lives as long as it."""

    def __init__(self, keeper: str) -> None:
        super().__init__(datasets={})
        self._controller_actor_id = keeper

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell the cluster of the run."""
        self._state_manager = TrainStateManager()
        self._run_name = train_run_context.get_run_config().name
        self._run_id = train_run_context.run_id
        self._job_id = ray.get_runtime_context().get_job_id()
        with warnings.catch_warnings():  # Ray describes its options by names that it gives up
            warnings.simplefilter("ignore", RayDeprecationWarning)
            self._state_manager.create_train_run(
                id=self._run_id,
                name=self._run_name,
                job_id=self._job_id,
                controller_actor_id=self._controller_actor_id,
                controller_log_file_path="",
                run_config=train_run_context.run_config,
                train_loop_config=train_run_context.train_loop_config,
                scaling_config=train_run_context.scaling_config,
                backend_config=train_run_context.backend_config,
                datasets={},
                dataset_config=train_run_context.dataset_config,
            )
