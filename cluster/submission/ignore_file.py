"""The ignore file of a first config: what neither git nor a cluster needs."""

from contextlib import suppress
from pathlib import Path

NAME = ".gitignore"
TEXT = """\
# What stays here when the folder is committed, or goes to a cluster with a job.
.venv/
runs/
__pycache__/
.env
"""


def write_ignore_file(folder: Path) -> bool:
    """Write one unless the folder has one; returns whether it did. Raises OSError."""
    with suppress(FileExistsError), (folder / NAME).open("x") as file:
        file.write(TEXT)
        return True
    return False
