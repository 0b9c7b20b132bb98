"""A hub on this disk: what a machine has downloaded, as `huggingface_hub` lays it out."""

import hashlib
import shutil
from pathlib import Path


def publish(cache: Path, name: str, revisions: dict[str, Path]) -> None:
    """Put folders into a hub cache as revisions of one repository; one is to be called main."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for revision, folder in revisions.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
