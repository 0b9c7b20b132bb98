"""Versions of weights in a folder: named by their content, kept as long as they are needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from shared.targets import weights
from shared.targets.weights import ModuleFiles, WeightFiles, WeightsRef, digest_of

CONTENT = bytes(range(100))


def holding(content: bytes) -> Callable[[Path], None]:
    """What saves this content."""

    def save(path: Path) -> None:
        path.write_bytes(content)

    return save


def test_a_digest_is_of_the_whole_file_however_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    for size in (1, 7, 100, 2**24):
        monkeypatch.setattr(weights, "BLOCK_BYTES", size)
        assert digest_of(path) == xxhash.xxh3_128_hexdigest(CONTENT)


@pytest.fixture
def beside(tmp_path) -> list[Path]:
    """Files of others in the folder, and one that is being written."""
    names = ("version-000001.txt", "version-1.safetensors", ".version-000001.safetensors.draft")
    found = [tmp_path / name for name in (*names, "version-000001.old.safetensors")]
    for path in found:
        path.write_bytes(b"")
    return found


def test_older_versions_of_weights_go_and_nothing_else(tmp_path, beside):
    files = WeightFiles(tmp_path)
    for version in (0, 9, 10, 11, 1_000_000):
        files.path(version).write_bytes(CONTENT)
    files.forget(lambda version: version >= 10)
    kept = [files.path(version) for version in (10, 11, 1_000_000)]
    assert sorted(tmp_path.iterdir()) == sorted([*kept, *beside])
    assert files.digest(10) == digest_of(kept[0])


def test_modules_that_nobody_needs_go_and_nothing_else(tmp_path, beside):
    files, refs = ModuleFiles(tmp_path), []
    for version in range(4):
        for content in (b"one", b"two"):  # of two replicas
            refs.append(files.write(version, holding(content + bytes([version]))))
    stale, at_work = (tmp_path / f".version-{v:06d}.{'0' * 32}.draft" for v in (2, 3))
    for draft in (stale, at_work):
        draft.write_bytes(b"")
    files.forget(lambda version: version in (1, 3))
    kept = [at_work] + [files.path(ref) for ref in refs if ref.version in (1, 3)]
    assert sorted(tmp_path.iterdir()) == sorted([*kept, *beside])


def test_what_is_written_lies_under_its_version_and_digest(tmp_path):
    files = ModuleFiles(tmp_path)
    ref = files.write(12, holding(CONTENT))
    assert ref == WeightsRef(12, xxhash.xxh3_128_hexdigest(CONTENT))
    assert files.path(ref).read_bytes() == CONTENT
    assert files.write(12, holding(CONTENT)) == ref  # another replica takes the same update
    assert list(tmp_path.iterdir()) == [files.path(ref)]
