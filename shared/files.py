"""Modes of files: as the umask of the process allows, whoever wrote them."""

import uuid
from pathlib import Path

SPECIAL_BITS = 0o7000  # among them setgid, by which what lies in a folder gets its group


def obey_umask(path: Path) -> None:
    """Give a file, or a folder and all that lies in it, the mode that `open` and `mkdir` would.

    Writers of safetensors and of temporary folders keep everybody else out. A fresh file is looked
    at, since the umask cannot be read without setting it for all threads. Raises OSError.
    """
    folder = path if path.is_dir() else path.parent
    probe = folder / f".{uuid.uuid4().hex}.mode"
    probe.touch()
    allowed = probe.stat().st_mode & 0o666
    probe.unlink()
    searched = allowed | (allowed & 0o444) >> 2  # of a folder: who reads it enters it
    for found in [path, *(path.rglob("*") if path.is_dir() else ())]:
        kept = found.stat().st_mode & SPECIAL_BITS
        found.chmod(kept | (searched if found.is_dir() else allowed))
