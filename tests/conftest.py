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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For two processes (`make test`): the files that need the Ray cluster come first and share
    one, every other file goes to whichever is free."""
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in on_ray)
    for item in items:
        group = "ray" if item.path in on_ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
    """One local Ray cluster for the whole session of this process."""
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
