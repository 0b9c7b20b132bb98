"""Modes of files and folders: as the umask allows, and of the folder's group where it is kept."""

import os
import stat
from pathlib import Path

import pytest

from shared.files import obey_umask


@pytest.mark.parametrize(
    ("umask", "of_file", "of_folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)]
)
def test_modes_follow_the_umask_and_keep_the_bit_of_the_group(
    tmp_path: Path, umask: int, of_file: int, of_folder: int
) -> None:
    folder = tmp_path / "export"
    before = os.umask(umask)
    try:
        (folder / "inner").mkdir(parents=True)
        folder.chmod(0o2700)
        file = folder / "inner" / "weights"
        file.touch()
        file.chmod(0o600)
        obey_umask(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == of_file
    assert stat.S_IMODE(folder.stat().st_mode) == of_folder | stat.S_ISGID
    assert stat.S_IMODE((folder / "inner").stat().st_mode) == of_folder
