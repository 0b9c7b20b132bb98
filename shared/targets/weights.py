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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from shared.errors import not_kept
from shared.files import obey_umask

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


def _write(
    draft: Path,
    version: int,
    save: Callable[[Path], None],
    path_of: Callable[[WeightsRef], Path],
    what: str,
) -> WeightsRef:
    """Give what `save` writes its name, once it is complete. Raises StorageError, and leaves no
    draft then."""
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        save(draft)
        obey_umask(draft)
        ref = WeightsRef(version, digest_of(draft))
        draft.replace(path_of(ref))
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise not_kept(f"version {version} of {what}", draft.parent, error) from None
    return ref


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A folder of versions of a student, written by one process and read by many."""

    folder: Path

    def path(self, version: int) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version-{version:06d}.safetensors"

    def digest(self, version: int) -> str:
        """Hash over the content of a version's file. Raises OSError."""
        return digest_of(self.path(version))

    def write(self, version: int, save: Callable[[Path], None]) -> WeightsRef:
        """Write a version by `save`, whole or not at all. Raises StorageError."""
        path = self.path(version)
        draft = path.with_name(f".{path.name}.draft")
        return _write(draft, version, save, lambda _: path, "the student's weights")

    def forget(self, is_needed: Callable[[int], bool]) -> None:
        """Remove the versions that nobody needs any more."""
        for path in self.folder.glob("version-*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match is not None and not is_needed(int(match[1])):
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ModuleFiles:
    """A folder of versions of a teacher's modules, whose names hold their digests: written by
    whichever replica takes an update, also twice, and read by all."""

    folder: Path

    def path(self, ref: WeightsRef) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version-{ref.version:06d}.{ref.digest}.safetensors"

    def write(self, version: int, save: Callable[[Path], None]) -> WeightsRef:
        """Write a version by `save`, whole or not at all. Raises StorageError."""
        draft = self.folder / f".version-{version:06d}.{uuid.uuid4().hex}.draft"  # nobody else's
        return _write(draft, version, save, self.path, "the teacher's modules")

    def forget(self, is_needed: Callable[[int], bool]) -> None:
        """Remove the versions that nobody needs any more, and what writers of theirs that were
        killed left."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _MODULES_NAME.fullmatch(path.name) or _DRAFT_NAME.fullmatch(path.name)
            if match is not None and not is_needed(int(match[1])):
                path.unlink(missing_ok=True)
