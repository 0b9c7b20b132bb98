"""Checkpoints: one directory each, whole or not there.

    step-000100/
      shards/        DeepSpeed's optimiser and model shards of every rank
      weights/       the student as a plain Hugging Face or PEFT folder
      probe.npz      logits on fixed token ids, for whoever loads the weights elsewhere
      state.json     step, sums of the open metrics line, what a resume must find unchanged
      manifest.json  size and checksum of every other file; written last

A checkpoint is written beside its final name, flushed to disk and renamed. Reading verifies it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import xxhash

from shared.errors import CheckpointError, ConfigError, StorageError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STATE = "state.json"
CHECKPOINT_FORMAT = 3  # counts up when what a checkpoint holds changes
_NAME = re.compile(r"step-(\d{6,})")
_BLOCK_BYTES = 2**22


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step-{step:06d}"


def draft_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return folder / f".{checkpoint_name(step)}.draft"


def publish(draft: Path, *, step: int, keep: int) -> Path:
    """Seal a complete draft with its manifest, rename it into place, drop the oldest ones.

    Raises OSError where the disk does not take it; what was there before stays.
    """
    files = sorted(p for p in draft.rglob("*") if p.is_file())
    described = {str(p.relative_to(draft)): _described(p) for p in files}
    for path in files:
        _flush(path)
    manifest = draft / MANIFEST
    manifest.write_text(json.dumps({"files": described}, indent=1))
    _flush(manifest)
    final = draft.with_name(checkpoint_name(step))
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    _flush(final.parent)
    for old in all_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def discard_drafts(folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for draft in folder.glob(".step-*.draft"):
        shutil.rmtree(draft, ignore_errors=True)


def all_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first, verified or not."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def whence(folder: Path) -> str:
    """Where training goes on, for the end of a sentence."""
    found = all_checkpoints(folder)
    return f"from step {step_of(found[-1])}" if found else "from the start, as no step was saved"


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max(map(step_of, all_checkpoints(folder)), default=0)


def step_of(checkpoint: Path) -> int:
    """Updates done when it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, "only published checkpoints have a step"
    return int(match[1])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what they were; damaged ones are named and passed.

    Raises CheckpointError where there are checkpoints and all are damaged.
    """
    candidates = all_checkpoints(folder)
    for checkpoint in reversed(candidates):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        log.warning("%s is damaged (%s); the one before it is used", checkpoint, damage)
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged; "
            "restore one from a backup or start over with --fresh"
        )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected: Mapping = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or broken"
    for name, described in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _described(path) != described:
            return f"{name} has changed"
    return None


def write_state(draft: Path, state: Mapping) -> None:
    """Write the values a resume starts from."""
    (draft / STATE).write_text(json.dumps(state, indent=1))


def read_state(checkpoint: Path) -> dict:
    """The values a resume starts from."""
    return json.loads((checkpoint / STATE).read_text())


def refuse_changes(checkpoint: Path, *, found: Mapping, asked: Mapping) -> None:
    """Raise CheckpointError naming the first fact of the run that differs from the checkpoint's."""
    for name, value in asked.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{checkpoint.name} was written with {name} {found.get(name)}, now it is {value}; "
                "change it back to resume, or start over with --fresh"
            )


def refuse_fewer_steps(folder: Path, *, steps: int) -> None:
    """Raise ConfigError where a run's checkpoints are of a later step than its last."""
    done = last_step(folder)
    if done > steps:
        raise ConfigError(
            f"steps is {steps}, but {done} steps of this run are done, and taking fewer would undo "
            f"some; set steps={done} or more, or start over with --fresh"
        )


def storage_error(checkpoint: Path, reason: str) -> StorageError:
    """What a failed save tells the user."""
    return StorageError(
        f"{checkpoint.name} cannot be saved in {checkpoint.parent}: {reason}; "
        "free some space and run the same command again, it resumes from the checkpoint before"
    )


def _described(path: Path) -> dict:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
