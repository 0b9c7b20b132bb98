"""Parts shared by the tests: tiny real models, the reference folder, one Ray cluster."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared"


@cache
def needs_ray(file: str) -> bool:
    """Whether a test file asks for the Ray cluster."""
    return "ray_cluster" in (ROOT / file).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the Ray cluster comes first: it takes longest."""
    items.sort(key=lambda item: not needs_ray(item.location[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For two processes (`make test`): the files that need the Ray cluster share one, every other
    file goes to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return "ray" if needs_ray(file) else file

    return ByFile(config, log)


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
