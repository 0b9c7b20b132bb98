"""Save and load what DeepSpeed holds, and the student as a plain folder; all ranks together.

A rank whose disk is full must not leave the others waiting at a barrier, so writing errors are
kept until every rank is through and are then agreed on.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from shared.errors import StorageError, reason_of
from shared.files import obey_umask
from student_trainer.engine import gather_weights
from student_trainer.models.saving import buffers_of
from student_trainer.models.student import Student
from student_trainer.ranks import Ranks
from student_trainer.state.checkpoint import (
    checkpoint_name,
    discard_drafts,
    draft_of,
    publish,
    storage_error,
    write_state,
)
from student_trainer.tasks.task import PIXELS

TAG = "shards"
WEIGHTS = "weights"
PROBE = "probe.npz"
PROBE_TOKENS = 8


class _Writer(TorchCheckpointEngine):
    """Writes shards and remembers the first failure instead of raising it on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
        except (OSError, RuntimeError) as error:
            # Of a full disk torch says where it noticed, and the file itself says why.
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            self.failure = self.failure or reason_of(why)


def save_shards(engine: Any, draft: Path) -> str | None:
    """Write every rank's shard below `draft`; returns why this rank failed, or None."""
    writer = _Writer()
    before, engine.checkpoint_engine = engine.checkpoint_engine, writer
    # DeepSpeed copies scripts of its own beside the shards, and where they do not fit it raises on
    # one rank; they are not needed.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(
            str(draft), tag=TAG, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
        )
    finally:
        engine.checkpoint_engine = before
    return writer.failure


def load_shards(engine: Any, checkpoint: Path) -> None:
    """Restore optimiser and trained weights of every rank."""
    engine.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=not _has_frozen(engine))


def save_weights(student: Student, draft: Path, *, ranks: Ranks) -> str | None:
    """Write `weights/` as transformers or peft would; returns why it failed, or None."""
    gathered = gather_weights(student.saved, trained_only=student.is_adapted)
    if not ranks.leads:
        return None
    return _failure(lambda: _write_folder(student, draft / WEIGHTS, gathered))


def _write_folder(student: Student, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    if student.is_adapted:
        student.saved.save_pretrained(  # type: ignore[operator]
            str(folder), state_dict=weights, save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # peft's own card, empty
    else:
        student.saved.save_pretrained(  # type: ignore[operator]
            str(folder), state_dict=weights | buffers_of(student.saved)
        )
    obey_umask(folder)


def _has_frozen(engine: Any) -> bool:
    return not all(p.requires_grad for p in engine.module.parameters())


def write_checkpoint(
    engine: Any,
    student: Student,
    *,
    folder: Path,
    step: int,
    state: Mapping,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write, seal and publish the checkpoint of `step`; all ranks together.

    Raises StorageError on every rank where the disk did not take it on any; nothing is lost.
    """
    draft, final = draft_of(folder, step), folder / checkpoint_name(step)
    probe = probe_logits(engine)

    def agreed(failure: str | None) -> None:
        try:
            ranks.agree(None if failure is None else storage_error(final, failure))
        except StorageError:
            if ranks.leads:
                shutil.rmtree(draft, ignore_errors=True)  # what is left to say needs some space
            raise

    agreed(_prepare(draft) if ranks.leads else None)
    agreed(save_shards(engine, draft))
    agreed(save_weights(student, draft, ranks=ranks))

    def seal() -> None:
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in probe.items()}
        np.savez(draft / PROBE, **arrays)
        write_state(draft, state)
        publish(draft, step=step, keep=keep)

    agreed(_failure(seal) if ranks.leads else None)
    return final


def probe_logits(engine: Any) -> dict[str, torch.Tensor]:
    """The engine's own `logits` [N, V] on fixed token `ids` [T], and what it reads beside them by
    the names of its batch; what an export must reproduce."""
    batch = engine.module.probe(engine.device, tokens=PROBE_TOKENS)
    engine.eval()
    with torch.no_grad():
        (logits_NV,) = engine(batch, mode="logits")
    engine.train()
    beside = {name: tensor for name, tensor in batch.items() if name.startswith(PIXELS)}
    return {"ids": batch["input_ids_BT"][0], "logits": logits_NV.float(), **beside}


def _prepare(draft: Path) -> str | None:
    def make() -> None:
        draft.parent.mkdir(parents=True, exist_ok=True)
        discard_drafts(draft.parent)
        draft.mkdir()

    return _failure(make)


def _failure(action: Callable[[], object]) -> str | None:
    """Why a piece of writing failed, or None."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:
        return reason_of(error)
    return None
