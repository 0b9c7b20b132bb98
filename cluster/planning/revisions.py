"""Revisions that are asked of what has none: a folder on this machine."""

from collections.abc import Iterator
from pathlib import Path

from shared.config.domains import HubDataset
from shared.config.run import Config
from shared.text.sources import sources_of


def revision_notes(config: Config) -> Iterator[str]:
    """A sentence for each revision of a resolved config that is asked of a folder, or a file."""
    for option, name, revision in _asked(config):
        if revision is not None and Path(name).exists():
            yield (
                f"{option} is {revision}, but {name} lies on this machine and has no revisions: "
                "it is read as it is"
            )


def _asked(config: Config) -> Iterator[tuple[str, str, str | None]]:
    """Option, what it is asked of, and its value."""
    yield "student.revision", config.student.model, config.student.revision
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}.revision", teacher.model, teacher.revision
        if teacher.adapter is not None:
            yield f"teachers.{name}.adapter_revision", teacher.adapter, teacher.adapter_revision
    for name, domain in config.domains.items():
        for split in ("train", "validation"):
            for source in sources_of(domain, split):
                if isinstance(source, HubDataset):
                    yield f"domains.{name}.{split}.revision", source.dataset, source.revision
