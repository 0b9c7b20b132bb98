"""Weights & Biases: online where there is a key, else with WANDB_MODE=offline files in the run's
folder for `wandb sync`."""

import netrc
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from student_trainer.tracking.tracker import Service, TrackedRun

AXIS = "step"
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
LOCAL_MODES = ("offline", "dryrun", "disabled")
HOST = "https://api.wandb.ai"


class WandbRun:
    """A run of W&B, whose x axis is the run's own step; W&B's counter takes no step twice."""

    def __init__(self, tracked: TrackedRun) -> None:
        wandb: Any = import_module("wandb")
        quiet = {"console": "off", "silent": True, "save_code": False, "disable_git": True}
        quiet |= {"x_save_requirements": False}  # environment.json has what matters
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tutelage"),
            id=tracked.id,
            name=tracked.name,
            resume="allow",
            dir=str(tracked.folder),
            settings=wandb.Settings(**quiet),
        )
        self._run.config.update(dict(tracked.options), allow_val_change=True)
        self._run.define_metric("*", step_metric=AXIS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve."""
        self._run.log({**values, AXIS: step})

    def note(self, step: int, text: str) -> None:
        """Add a line to the run's notes, which its page shows."""
        before = self._run.notes
        self._run.notes = f"{before}\n{text}" if before else text

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _lacks() -> str | None:
    if os.environ.get("WANDB_MODE") in LOCAL_MODES or any(os.environ.get(key) for key in KEYS):
        return None
    if _in_netrc(os.environ.get("WANDB_BASE_URL", HOST)):
        return None
    return "it has no key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"


def _in_netrc(url: str) -> bool:
    """Whether `wandb login` left a key for a server."""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


WANDB = Service("Weights & Biases", "wandb", WandbRun, _lacks)
