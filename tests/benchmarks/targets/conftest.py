"""Parts shared by the benchmarks' tests."""

from pathlib import Path

import pytest

from tests.benchmarks.targets.wide_pair import wide_pair


@pytest.fixture(scope="session")
def wide_models(reference: Path, pytestconfig: pytest.Config) -> dict[str, Path]:
    """The folders of the pair with the widest vocabulary, kept from one session to the next."""
    assert pytestconfig.cache is not None
    return wide_pair(reference, pytestconfig.cache.mkdir("wide_pair"))
