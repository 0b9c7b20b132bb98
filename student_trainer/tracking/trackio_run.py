"""trackio: on this machine, where `trackio show` finds it, or in the Space of TRACKIO_SPACE_ID or
on the server of TRACKIO_SERVER_URL."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from student_trainer.tracking.tracker import Service, TrackedRun

ID_CHARS = 8  # trackio knows runs by their names


class TrackioRun:
    """A run of trackio."""

    def __init__(self, tracked: TrackedRun) -> None:
        self._trackio: Any = import_module("trackio")
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "tutelage"),
            name=f"{tracked.name}-{tracked.id[:ID_CHARS]}",
            resume="allow",
            config=dict(tracked.options),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve."""
        self._run.log({n: v for n, v in values.items() if n != "step"}, step=step)  # its axis

    def note(self, step: int, text: str) -> None:
        """Add a text to the step."""
        self._run.log({"note": self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def _lacks() -> str | None:
    if os.environ.get("TRACKIO_SPACE_ID") and import_module("huggingface_hub").get_token() is None:
        return (
            "TRACKIO_SPACE_ID names a Space and there is no token for it; run `hf auth login`, or "
            "unset TRACKIO_SPACE_ID to keep curves on this machine"
        )
    server = os.environ.get("TRACKIO_SERVER_URL", "")
    if server and "write_token=" not in server and not os.environ.get("TRACKIO_WRITE_TOKEN"):
        return "TRACKIO_SERVER_URL names a server and TRACKIO_WRITE_TOKEN is not set; set it"
    return None


TRACKIO = Service("trackio", "trackio", TrackioRun, _lacks)
