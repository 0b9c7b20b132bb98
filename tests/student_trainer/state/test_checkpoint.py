"""Checkpoints are whole or not there, and damage is found."""

import logging
from pathlib import Path

import pytest

from shared.errors import CheckpointError
from student_trainer.state.checkpoint import (
    CHECKPOINT_FORMAT,
    all_checkpoints,
    damage_of,
    discard_drafts,
    draft_of,
    latest_checkpoint,
    publish,
    refuse_changes,
)


def saved(folder: Path, step: int, *, keep: int = 2) -> Path:
    """A published checkpoint with one shard."""
    draft = draft_of(folder, step)
    (draft / "shards").mkdir(parents=True)
    (draft / "shards" / "rank0.pt").write_bytes(bytes([step % 256]) * 1000)
    return publish(draft, step=step, keep=keep)


def test_the_newest_checkpoints_stay_in_numeric_order(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        saved(tmp_path, step)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, last = saved(tmp_path, 100), saved(tmp_path, 200)
    shard = last / "shards" / "rank0.pt"
    match harm:
        case "flip":
            shard.write_bytes(b"x" + shard.read_bytes()[1:])
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "remove":
            shard.unlink()
        case "manifest":
            (last / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == before
    assert "step-000200" in caplog.text


def test_only_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    (saved(tmp_path, 100) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="--fresh"):
        latest_checkpoint(tmp_path)


def test_an_interrupted_save_is_invisible_and_swept_away(tmp_path: Path) -> None:
    kept = saved(tmp_path, 100)
    draft = draft_of(tmp_path, 200)
    draft.mkdir()
    assert latest_checkpoint(tmp_path) == kept
    discard_drafts(tmp_path)
    assert not draft.exists()
    assert damage_of(kept) is None


def test_a_change_since_the_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-000100 .* seed 1, now it is 2"):
        refuse_changes(tmp_path / "step-000100", found={"seed": 1}, asked={"seed": 2})


def test_a_checkpoint_of_an_older_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint format None, now it is 3"):
        refuse_changes(
            tmp_path / "step-000100", found={}, asked={"checkpoint format": CHECKPOINT_FORMAT}
        )
