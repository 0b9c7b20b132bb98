"""Parts shared by the tests: tiny real models, the reference folder, one Ray cluster."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

REFERENCE = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Real text and models; absent on a user's machine."""
    if not (REFERENCE / "models" / "teacher-6m").is_dir():
        pytest.skip("the reference folder with real text and models is not beside the project")
    return REFERENCE


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tiny.Pair:
    """A random teacher and a smaller random student that share a tokenizer, saved to disk."""
    return tiny.save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole session."""
    import ray

    ray.init(
        num_cpus=8,
        resources={"teacher": 8, "student": 8},
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=512 * 2**20,
    )
    yield
    ray.shutdown()
