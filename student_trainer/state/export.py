"""Export: a checkpoint's weights as a plain folder that transformers or peft load by themselves.

The folder is built beside its final name, loaded in a fresh process without any of our code, its
logits are compared with those of the training engine, and only then it is renamed into place.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from shared.config.models.student import LoRATraining, QLoRATraining, Student
from shared.config.paths import without_job_folder
from shared.config.run import Config
from shared.errors import CheckpointError, StorageError, reason_of
from shared.files import obey_umask
from shared.loading import EXPORTED, keep_upcycling
from shared.model_parts import tolerance
from shared.run.run_dir import RunDir, read_written
from student_trainer.state.checkpoint import damage_of, latest_checkpoint, read_state, step_of
from student_trainer.state.model_card import model_card
from student_trainer.state.usage import save_usage
from student_trainer.tasks.task import ModelKind

ADAPTER_CONFIG = "adapter_config.json"
# A process without any of our code that loads a folder.
FRESH: tuple[str, ...] = (sys.executable, "-I", str(Path(__file__).parent / "reload.py"))


class Reloader:
    """A fresh process without any of our code, which imports while training ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            FRESH,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self, question: dict) -> dict:
        """What `reload.py` says. Raises CheckpointError where a folder cannot be loaded."""
        said, trouble = self._process.communicate(json.dumps(question) + "\n")
        if self._process.returncode:
            reason = (trouble.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"cannot be loaded: {reason}")
        try:
            return json.loads(said.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise CheckpointError(f"cannot be loaded: its process said {said!r:.200}") from None

    def close(self) -> None:
        """End it, asked or not."""
        self._process.kill()
        self._process.communicate()


def export_checkpoint(
    checkpoint: Path,
    *,
    config: Config,
    run_dir: RunDir,
    kind: ModelKind,
    reloader: Reloader | None = None,
) -> Path:
    """Publish a checkpoint as `run_dir.export`, replacing an older export; returns the folder.

    `reloader` is asked whether transformers loads it; without one, one is started.
    Raises CheckpointError where the checkpoint is damaged or the folder does not reproduce the
    student, StorageError where the disk is full.
    """
    refuse_damaged(checkpoint)
    with publishing(run_dir.export) as draft:
        shutil.copytree(checkpoint / "weights", draft)
        describe(draft, checkpoint, config=config, run_dir=run_dir, labels=kind.labels)
        _refuse_empty_tensors(draft)
        with closing(reloader or Reloader()) as fresh:
            _refuse_other_logits(draft, checkpoint, config, kind, fresh)
    return run_dir.export


def newest_export(run_dir: RunDir, config: Config, kind: ModelKind) -> Path | None:
    """The folder with the newest checkpoint's student, written where it is not there yet; without
    a checkpoint an export that is there, or None. Raises what `export_checkpoint` raises."""
    checkpoint, step = latest_checkpoint(run_dir.checkpoints), exported_step(run_dir.export)
    if checkpoint is None:
        return None if step is None else run_dir.export
    if step != step_of(checkpoint):
        export_checkpoint(checkpoint, config=config, run_dir=run_dir, kind=kind)
    return run_dir.export


def refuse_damaged(checkpoint: Path) -> None:
    """Raise CheckpointError where a checkpoint's files are not what they were."""
    damage = damage_of(checkpoint)
    if damage is not None:
        raise CheckpointError(
            f"{checkpoint} cannot be exported: {damage}; choose another checkpoint of the run"
        )


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """The name of a draft that replaces `folder` at the end of a `with`, and is gone after a
    failure. Raises StorageError where the disk does not take it."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {reason_of(error)}; free some space, or name another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def exported_step(folder: Path) -> int | None:
    """Updates behind an export, or None where there is none that is whole."""
    facts = folder / EXPORTED
    if not facts.exists():
        return None
    found = read_written(facts)
    return found["step"] if _sizes(folder).items() >= found["files"].items() else None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by name."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def describe(
    draft: Path,
    checkpoint: Path,
    *,
    config: Config,
    run_dir: RunDir,
    merged: bool = False,
    labels: tuple[str, ...] = (),
) -> None:
    """Put into a folder with weights what else an export has: tokenizer, generation config, card,
    and facts. `merged` says that adapters lie in the base's weights, `labels` are those of a
    classifier."""
    name_base(draft)
    if not (draft / ADAPTER_CONFIG).exists():
        keep_upcycling(draft, Path(config.student.model))
    usage = save_usage(draft, config)
    step = step_of(checkpoint)
    frozen = read_state(checkpoint).get("frozen_weights")
    card = model_card(config, run_dir=run_dir, step=step, frozen=frozen, usage=usage, merged=merged)
    (draft / "README.md").write_text(card)
    facts: dict[str, Any] = {"run": config.name, "step": step, "checkpoint": checkpoint.name}
    if labels:
        facts["labels"] = labels
    facts["files"] = _sizes(draft)
    (draft / EXPORTED).write_text(json.dumps(facts, indent=1))
    obey_umask(draft)


def whole_settings(student: Student, kind: ModelKind) -> dict:
    """How `reload.py` loads a folder that holds a whole model."""
    return {
        "auto_class": kind.auto_class,
        "base": None,
        "revision": None,
        "dtype": student.dtype,
        "quantisation": "none",
        "trust_remote_code": student.trust_remote_code,
        "num_labels": len(kind.labels),
    }


def name_base(draft: Path) -> None:
    """Name the base of an adapter as the user did where it came with a job, whose folder does not
    last."""
    path = draft / ADAPTER_CONFIG
    if path.exists():
        settings = json.loads(path.read_text())
        base = settings["base_model_name_or_path"]
        if base and base != (lasting := without_job_folder(base)):
            path.write_text(json.dumps(settings | {"base_model_name_or_path": lasting}, indent=2))


def _refuse_empty_tensors(draft: Path) -> None:
    """A weight gathered wrongly shows up as a tensor without elements."""
    for path in draft.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            empty = [name for name in file.keys() if 0 in file.get_slice(name).get_shape()]  # noqa: SIM118
        if empty:
            raise CheckpointError(f"{path.name} holds empty tensors: {', '.join(empty)}")


def _refuse_other_logits(
    draft: Path, checkpoint: Path, config: Config, kind: ModelKind, reloader: Reloader
) -> None:
    """Load the draft in a fresh process and compare its logits with the training engine's."""
    student = config.student
    settings = whole_settings(student, kind)
    if isinstance(student.train, LoRATraining):
        settings |= {"base": student.model, "revision": student.revision}
    if isinstance(student.train, QLoRATraining):
        settings["quantisation"] = "nf4"
    probe = str(checkpoint / "probe.npz")
    try:
        found = reloader.answer({"folder": str(draft), "probe": probe, "settings": settings})
    except CheckpointError as error:
        raise CheckpointError(f"the export of {checkpoint.name} {error}") from None
    assert not found["ours"], "the fresh process runs without our code"
    if not found["difference"] <= tolerance(student.dtype, reordered=True):
        raise CheckpointError(
            f"the export of {checkpoint.name} gives logits that differ from the trained student's "
            f"by {found['difference']:.1e} of the largest one; nothing was published"
        )
