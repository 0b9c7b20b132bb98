"""A job whose working folder was removed works in the copy that is unpacked in its place."""

import os
import threading
import time
from pathlib import Path

import pytest

from cluster.session.job_copy import enter
from shared.errors import PlacementError


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The folder that this process works in, removed under it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    copy.rmdir()
    return copy


def test_a_copy_that_is_unpacked_again_is_worked_in(copy):
    threading.Timer(0.5, copy.mkdir).start()
    enter(str(copy), patience_s=30)
    assert Path.cwd() == copy


def test_a_copy_that_never_comes_is_a_sentence_at_the_deadline(copy):
    started = time.monotonic()
    with pytest.raises(PlacementError, match=rf"removed .*{copy}, and has not .* submit"):
        enter(str(copy), patience_s=0.5)
    assert time.monotonic() - started < 5


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enter(str(tmp_path / "other"), patience_s=0)
    assert os.getcwd() == str(tmp_path)
