"""Processes that several files of tests share."""

from collections.abc import Iterator

import pytest

from tests.teacher_service.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """A tensor-parallel group of two CPU processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
