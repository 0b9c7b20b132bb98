"""Versions of a student's weights as files, and how a request names one.

    weights/
      version-000012.safetensors    trained weights after 12 updates

The version is the number of updates behind the weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 2**24
CANARY_IDS = "canary_ids"  # in a file's metadata: the token ids of a fixed text, JSON
_NAME = re.compile(r"version-(\d{6,})\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The weights that a request is about."""

    version: int  # updates behind them
    digest: str  # of the file's content


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A folder of versions, written by one process and read by many."""

    folder: Path

    def path(self, version: int) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version-{version:06d}.safetensors"

    def digest(self, version: int) -> str:
        """Hash over the content of a version's file. Raises OSError."""
        state = xxhash.xxh3_128()
        with self.path(version).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                state.update(block)
        return state.hexdigest()

    def forget(self, *, before: int) -> None:
        """Remove older versions."""
        for path in self.folder.glob("version-*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) < before:
                path.unlink(missing_ok=True)
