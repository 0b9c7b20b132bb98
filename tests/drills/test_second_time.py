"""Everything works the second time, whatever the first left behind."""

from pathlib import Path

import pytest

from tests.drills.commands import Home, wait_until

pytestmark = pytest.mark.drill

SHORT = ("steps=4", "checkpoints.every=4")


def small_run(home: Home, config: Path, runs: Path, name: str) -> str:
    """A few steps under a name."""
    return home.run("run", str(config), f"paths.runs={runs}", f"name={name}", *SHORT)


def our_token(home: Home) -> Path:
    return home.folder / ".cache" / "tutelage" / "auth_token"


def state_file(home: Home) -> Path:
    return home.folder / ".cache" / "tutelage" / "cluster.json"


def test_two_runs_after_each_other_without_and_with_a_token(home, config, tmp_path):
    assert not our_token(home).exists()
    assert "Validation text" in small_run(home, config, tmp_path, "first")
    token = our_token(home).read_text()
    assert "Validation text" in small_run(home, config, tmp_path, "second")
    assert our_token(home).read_text() == token
    assert "first is finished" in small_run(home, config, tmp_path, "first")
    assert not home.processes()


def test_a_cluster_left_over_from_yesterday_is_in_nobodys_way(home, config, tmp_path):
    (home.folder / ".ray").mkdir()
    (home.folder / ".ray" / "auth_token").write_text("0" * 64)  # as `ray` makes one
    one = "teachers.tiny.replicas=1"
    home.run("teacher", "up", str(config), one)
    for process in home.processes():
        process.kill()
    wait_until(lambda: not home.processes(), patience_s=30)
    assert state_file(home).exists()

    assert "none is running here" in home.run("status", "--runs", str(tmp_path))
    home.run("teacher", "up", str(config), one)
    said = home.run("train", str(config), f"paths.runs={tmp_path}", one, *SHORT)
    assert "Validation text" in said
    said = home.run("status", "--runs", str(tmp_path))
    assert "tiny: " in said
    assert "job: finished, step 4 of 4" in said
    home.run("teacher", "down", "--all")
    assert not home.processes()
