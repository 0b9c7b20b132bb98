"""What every family's trial shares: a Llama to learn from, rows, and a rank on its own."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.families.making import save_family
from tests.families.trial import Trial, plan_for
from tests.student_trainer.processes import teacher
from tests.student_trainer.runs import prepared_domains

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of all students."""
    folder = tmp_path_factory.mktemp("families") / "llama"
    tiny.save_model(folder, width=48, layers=2, tied=False, seed=1)
    return folder


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Rows of two domains."""
    return prepared_domains(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed keeps for all its engines."""
    path = tmp_path_factory.mktemp("group") / "rendezvous"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ALONE.items():
            environment.setenv(name, value)
        dist.init_process_group("gloo", f"file://{path}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def on_trial(
    alone: None, llama: Path, domains: tuple, tmp_path: Path
) -> Iterator[Callable[..., Trial]]:
    """A family's model on trial."""

    def make(family: str, sizes: dict | None = None, context: int = 64) -> Trial:
        model = save_family(family, tmp_path / family, seed=3, **sizes or {})
        engine: HFEngine = teacher(str(llama))
        plan = plan_for(model, llama, domains, tmp_path / "run", context=context)
        return Trial(model, plan, engine, tmp_path)

    yield make
    shutil.rmtree(tmp_path)
