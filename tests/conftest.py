"""Parts shared by the tests: tiny real models, the reference folder, a Ray cluster."""

import gc
import os
import tempfile
from contextlib import ExitStack

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves them beside other tests

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forking, tiny

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared"
FORKS = ExitStack()


# Files that take longest, the longest first: so the processes of `make test` end together.
LONGEST = (
    "student_trainer/training/test_torchrun.py",
    "student_trainer/test_two_teachers.py",
    "student_trainer/training/test_matrix.py",
    "student_trainer/tasks/test_classification.py",
    "student_trainer/sources/generated/test_rollouts.py",
    "student_trainer/sources/test_followed_student.py",
    "cluster/launch/test_driver.py",
    "student_trainer/sources/generated/test_pushing.py",
    "student_trainer/training/test_plain_loop.py",
    "student_trainer/models/test_frozen.py",
    "student_trainer/losses/across/test_across.py",
    "cluster/launch/test_capture.py",
    "student_trainer/sources/generated/test_partners.py",
    "student_trainer/sources/test_online_teacher.py",
    "cluster/test_api.py",
    "student_trainer/training/test_training_laws.py",
    "cluster/launch/test_asked.py",
    "student_trainer/state/test_merge.py",
    "student_trainer/tasks/test_image_text.py",
    "student_trainer/tasks/test_tagging.py",
    "student_trainer/training/test_more_steps.py",
    "teacher_service/service/test_pool.py",
    "student_trainer/state/test_resharding.py",
    "student_trainer/weighing/test_weighting.py",
    "teacher_service/service/test_service.py",
    "cluster/commands/test_plan.py",
    "cluster/planning/test_ordering.py",
    "cluster/sizing/test_tracing.py",
    "cluster/launch/test_classification.py",
    "student_trainer/models/test_adapters.py",
    "student_trainer/tasks/test_experts_that_see.py",
    "cluster/builtin/test_models.py",
    "cluster/launch/test_two_teachers.py",
    "cluster/evaluation/test_eval.py",
    "cluster/control/test_controller.py",
    "families/test_families.py",
    "cluster/launch/test_tagging.py",
    "cluster/probing/test_probe.py",
    "cluster/launch/test_across.py",
    "cluster/launch/test_pairing.py",
    "teacher_service/scoring/test_vocab.py",
    "cluster/launch/test_copies.py",
    "cluster/planning/test_prompting.py",
    "teacher_service/service/test_scaler.py",
    "teacher_service/engine/test_tensor_parallel.py",
    "cluster/launch/test_image_text.py",
    "cluster/sizing/test_held.py",
    "teacher_service/engine/test_audit.py",
    "teacher_service/engine/generation/test_generating.py",
    "cluster/launch/test_online_modules.py",
    "cluster/launch/test_staging.py",
    "cluster/commands/test_active.py",
    "cluster/planning/test_difficulty.py",
    "cluster/selftest/test_selftest_losses.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """One process of a run of tests serves forks to all."""
    if not hasattr(config, "workerinput"):
        config.add_cleanup(FORKS.close)
        folder = FORKS.enter_context(tempfile.TemporaryDirectory(prefix="forking-"))
        FORKS.enter_context(forking.serving(folder))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Nothing that is collected is garbage, nor looked through at a later collection of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first."""
    place = {f"tests/{file}": index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


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
    """A Ray cluster of this process's own, for its whole session, with the processes that a run's
    own cluster has."""
    import ray

    from cluster.session.session import NONE_AHEAD, with_variables, without_needless

    with without_needless(), with_variables(NONE_AHEAD):
        ray.init(
            address="local",
            num_cpus=8,
            resources={"teacher": 8, "student": 8},
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
            runtime_env={"py_executable": " ".join(forking.python("ray"))},
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def reloads() -> None:
    """Exports are loaded by forks; `test_torchrun.py` and the drills have new processes do it."""
    forking.reload_in_forks()
