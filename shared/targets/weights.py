"""Versions of weights as files, and how a request names one.

    weights/ and followed/
      version-000012.safetensors             a student's trained weights after 12 updates
    modules/
      version-000012.DIGEST.safetensors      a teacher's modules and their optimiser's moments

The version is the number of updates behind the weights.
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 2**24
CANARY = "canary"  # in a file's metadata: a fixed text and what its owner makes of it, JSON
_NAME = re.compile(r"version-(\d{6,})\.safetensors")
_DRAFT_NAME = re.compile(r"\.version-(\d{6,})\.[0-9a-f]{32}\.draft")
_MODULES_NAME = re.compile(r"version-(\d{6,})\.[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The weights that a request is about."""

    version: int  # updates behind them
    digest: str  # of the file's content; "": as they begin, without a file


BEGINNING = WeightsRef(0, "")


def digest_of(path: Path) -> str:
    """Hash over the content of a file. Raises OSError."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A folder of versions, written by one process and read by many."""

    folder: Path

    def path(self, version: int) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version-{version:06d}.safetensors"

    def digest(self, version: int) -> str:
        """Hash over the content of a version's file. Raises OSError."""
        return digest_of(self.path(version))

    def forget(self, *, before: int) -> None:
        """Remove older versions."""
        for path in self.folder.glob("version-*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) < before:
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ModuleFiles:
    """A folder of versions whose names hold their digests: written by whichever replica takes an
    update, also twice, and read by all."""

    folder: Path

    def path(self, ref: WeightsRef) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version-{ref.version:06d}.{ref.digest}.safetensors"

    def draft(self, version: int) -> Path:
        """A file that nobody else writes, to be published."""
        return self.folder / f".version-{version:06d}.{uuid.uuid4().hex}.draft"

    def publish(self, draft: Path, version: int) -> WeightsRef:
        """Give a complete file of this folder its name. Raises OSError."""
        ref = WeightsRef(version, digest_of(draft))
        draft.replace(self.path(ref))
        return ref

    def forget(self, is_needed: Callable[[int], bool]) -> None:
        """Remove the versions that nobody needs any more, and what writers of theirs that were
        killed left."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _MODULES_NAME.fullmatch(path.name) or _DRAFT_NAME.fullmatch(path.name)
            if match is not None and not is_needed(int(match[1])):
                path.unlink(missing_ok=True)
