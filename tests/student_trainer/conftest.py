"""A process group of this process alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from student_trainer.ranks import Ranks


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """One rank on its own."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()
