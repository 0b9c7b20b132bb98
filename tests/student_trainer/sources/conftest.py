"""Models and text of the runs of a file."""

from pathlib import Path

import pytest

from shared.data.prepared import PreparedDomain
from tests import tiny
from tests.student_trainer.runs import prepared_domains


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file's runs lie."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


@pytest.fixture(scope="module")
def material(folder: Path) -> tuple[tiny.Pair, tuple[PreparedDomain, ...]]:
    """A pair and two domains."""
    return tiny.save_pair(folder / "pair"), prepared_domains(folder)
