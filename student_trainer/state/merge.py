"""Merge: an adapted student as a whole model that transformers, vLLM and llama.cpp take as it is.

What adapters stand on is what they learnt on: of a QLoRA student the base as nf4 has it,
dequantised. Base and adapter must give the logits of the training engine, and the merged weights
those of base and adapter, in a fresh process; only then is the folder there.

T tokens   V vocabulary   C classes
"""

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from shared.config.models.student import LoRATraining, QLoRATraining
from shared.config.run import Config
from shared.errors import CheckpointError, ConfigError, StorageError
from shared.loading import first_line
from shared.model_parts import tolerance
from shared.run.run_dir import RunDir
from student_trainer.models.classes import keep_padding
from student_trainer.models.student import load_model
from student_trainer.state.export import (
    Reloader,
    describe,
    publishing,
    refuse_damaged,
    whole_settings,
)
from student_trainer.state.reload import pixels_in
from student_trainer.state.shards import PROBE, WEIGHTS
from student_trainer.tasks.task import ModelKind


def refuse_whole(config: Config) -> None:
    """Raise ConfigError for a run whose student has no adapters."""
    if not isinstance(config.student.train, LoRATraining):
        raise ConfigError(
            f"the run {config.name!r} trained the whole student (student.train.kind is "
            f"{config.student.train.kind}), so there is nothing to merge; export it without --merge"
        )


def merge_checkpoint(
    checkpoint: Path, *, config: Config, run_dir: RunDir, kind: ModelKind
) -> float:
    """Publish a checkpoint's base and adapter as the whole model `run_dir.merged`; returns how far
    its logits are from those of base and adapter, relative to the largest one.

    Raises ConfigError as `refuse_whole` does and where the base cannot be loaded, CheckpointError
    where the checkpoint is damaged or logits differ by more than rounding, StorageError where the
    disk is full.
    """
    refuse_whole(config)
    refuse_damaged(checkpoint)
    with publishing(run_dir.merged) as draft, TemporaryDirectory() as scratch:
        probe = Path(scratch) / PROBE
        _save_merged(draft, checkpoint, config, kind, probe)
        describe(draft, checkpoint, config=config, run_dir=run_dir, merged=True, labels=kind.labels)
        question = {"folder": str(draft), "probe": str(probe)}
        with closing(Reloader()) as fresh:
            settings = whole_settings(config.student, kind)
            try:
                found = fresh.answer(question | {"settings": settings})["difference"]
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.name}, merged, {error}") from None
        _refuse_far("the merged weights", "base and adapter", found, config, checkpoint)
    return found


def _save_merged(
    draft: Path, checkpoint: Path, config: Config, kind: ModelKind, probe: Path
) -> None:
    """Write the merged weights, and the logits of base and adapter to a file."""
    model = _with_adapter(checkpoint, config, kind)
    trained = np.load(checkpoint / PROBE)
    logits_TV = _logits(model, trained, kind)
    far = np.abs(logits_TV - trained["logits"]).max() / np.abs(trained["logits"]).max()
    _refuse_far("base and adapter", "the trained student", float(far), config, checkpoint)
    arrays: dict[str, Any] = dict(trained) | {"logits": logits_TV}
    np.savez(probe, **arrays)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(
            f"the adapter of {checkpoint.name} cannot be merged: {first_line(error)}"
        ) from error
    try:
        merged.save_pretrained(draft)
    except (SafetensorError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(
            f"{draft.parent} does not take the merged weights: {first_line(error)}; free some space"
        ) from error


def _with_adapter(checkpoint: Path, config: Config, kind: ModelKind) -> Any:
    """The trained student, its base in the dtype that training had, or dequantised to it."""
    from peft import PeftModel

    model: Any = load_model(config.student, kind)
    if kind.labels:  # which a decoder reads the last token of
        keep_padding(model, config.student)
    if isinstance(config.student.train, QLoRATraining):
        model = model.dequantize()
    return PeftModel.from_pretrained(model, str(checkpoint / WEIGHTS)).eval()


@torch.no_grad()
def _logits(model: Any, probe: Mapping[str, np.ndarray], kind: ModelKind) -> np.ndarray:
    """Logits [T, V] of a probe, or those of the classes [1, C], in float32, as training has
    them."""
    ids_1T = torch.from_numpy(probe["ids"])[None].to(model.device)
    if kind.labels:
        return model(input_ids=ids_1T).logits.float().cpu().numpy()
    pixels = {name: value.to(model.device) for name, value in pixels_in(probe, model).items()}
    return model(input_ids=ids_1T, use_cache=False, **pixels).logits[0].float().cpu().numpy()


def _refuse_far(what: str, than: str, found: float, config: Config, checkpoint: Path) -> None:
    """Raise CheckpointError where logits differ by more than the rounding of a dtype."""
    if not found <= tolerance(config.student.dtype, reordered=True):
        raise CheckpointError(
            f"the logits of {what} of {checkpoint.name} differ from those of {than} by "
            f"{found:.1e} of the largest one; nothing was published. Is {config.student.model} "
            "what it was in training?"
        )
