"""The trackers that a config can name, and whether they can be used here."""

from collections.abc import Iterable
from importlib.util import find_spec

from shared.errors import ConfigError
from student_trainer.tracking.mlflow_run import MLFLOW
from student_trainer.tracking.tracker import Service
from student_trainer.tracking.trackio_run import TRACKIO
from student_trainer.tracking.weights_and_biases import WANDB

SERVICES: dict[str, Service] = {"wandb": WANDB, "mlflow": MLFLOW, "trackio": TRACKIO}


def refuse_unready(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker that is not installed or has no credentials."""
    for name in names:
        service = SERVICES[name]
        if find_spec(service.package) is None:
            raise ConfigError(
                f"trackers names {name}, which is not installed; run "
                f"`pip install 'tutelage[{name}]'`, or take it out"
            )
        if (missing := service.lacks()) is not None:
            raise ConfigError(f"trackers names {name}, but {missing}")
