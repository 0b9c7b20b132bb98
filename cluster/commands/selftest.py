"""`tutelage selftest`: a real cluster, a real teacher service, and checks in a worker's place."""

import importlib
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.planning.preparation import Launch, prepare_run
from cluster.planning.tasks.classes import refuse_classifier, refuse_entities
from cluster.planning.tasks.images import refuse_images
from cluster.selftest.models import tiny_config
from shared.config.losses import ForwardKL
from shared.config.mixture import FixedMixture
from shared.config.run import Config, Paths
from shared.config.text.augmentation import Augmentation
from shared.config.weighting import Uniform
from shared.errors import ConfigError, SelftestError, TutelageError
from shared.run.plan import OpenReader, RunPlan
from shared.run.run_dir import RunDir

NAME_WIDTH = 20


def selftest(
    path: Path | None,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """Examine the pair of a config, or a tiny random one: a line per check.

    Raises UserErrors before anything starts, SelftestError where a check fails.
    """
    from cluster.planning.loading import load
    from cluster.session.session import prepare_environment

    prepare_environment()
    importlib.import_module("student_trainer.accelerator")  # sets DeepSpeed up before others do
    started = time.monotonic()
    config = plain(load(path, overrides)) if path else None
    with _scratch(Path((config.paths if config else Paths()).cache).expanduser()) as folder:
        failed = _examined(config or tiny_config(folder), folder, service=service, address=address)
    if failed:
        raise SelftestError(
            f"selftest failed at {', '.join(failed)}; do not train with these models and versions "
            "before you know why"
        )
    print(f"All is well, after {time.monotonic() - started:.0f} s.")


def plain(config: Config) -> Config:
    """A config's pair, payload and losses, without what would only take time or answer from disk;
    with forward KL where no loss needs the teacher, and with as many replicas as it starts with."""
    if config.cross_tokenizer is not None:
        raise ConfigError(
            f"cross_tokenizer is {config.cross_tokenizer}, and selftest compares a teacher and a "
            "student at the same tokens; plan with --probe takes steps of this pair"
        )
    refuse_entities(config, "selftest", "run with steps=10 to try the pair")
    refuse_classifier(config, "selftest", "run with steps=10 to try the pair")
    refuse_images(config, "selftest", "run with steps=10 to try the pair")
    losses = config.losses if config.needs_teacher else [*config.losses, ForwardKL()]
    return config.model_copy(
        update={
            "losses": losses,
            "teachers": {
                name: teacher.model_copy(update={"replicas": teacher.fewest})
                for name, teacher in config.teachers.items()
            },
            "targets": config.targets.model_copy(update={"store": None, "teacher_free": False}),
            "weighting": Uniform(),
            "augmentation": Augmentation(),
            "mixture": FixedMixture(),
            "progressive": None,
            "prompts": None,
            "baseline": False,
        }
    )


def _examined(
    config: Config, folder: Path, *, service: str | None, address: str | None
) -> list[str]:
    """Print every check of every teacher, "-" for no verdict; returns the names of those that
    failed."""
    from cluster.planning.room import refuse_unplaceable_early
    from cluster.session.services import reached, services_of
    from cluster.session.session import connected

    run_dir, services = RunDir(folder / "selftest"), services_of(config, service)
    run_dir.path.mkdir(parents=True)
    with reached(address, services):
        for teacher in config.teachers:
            refuse_unplaceable_early(config.taught_by(teacher), services)
        launch = Launch(prepare_run(config), run_dir, folder / "logs", services, trains=False)
        with connected(address):
            return [
                check for teacher in config.teachers for check in _failed(launch.taught_by(teacher))
            ]


def _failed(launch: Launch) -> list[str]:
    """Examine one teacher with the student; the names of the checks that failed."""
    from cluster.launch.teachers.serving import asking
    from cluster.planning.room import refuse_unplaceable

    refuse_unplaceable(launch)
    (name,), width = launch.config.teachers, NAME_WIDTH + 8
    print(f"{f'teacher {name}':<{width}}{launch.prepared.teacher.model}")
    print(f"{'student':<{width}}{launch.config.student.model}", flush=True)
    failed = []
    with asking(launch) as (plan, live):
        (open_reader,) = live.values()
        for check in _in_a_worker(plan, open_reader):
            verdict = {True: "ok", False: "failed", None: "-"}[check.ok]
            print(f"{verdict:<8}{check.name:<{NAME_WIDTH}}{check.said}", flush=True)
            failed += [check.name] * (verdict == "failed")
    return failed


def _in_a_worker(plan: RunPlan, open_reader: OpenReader) -> list:
    """The checks, made by a process with what a student's worker gets."""
    import ray
    from ray.exceptions import RayTaskError

    from cluster.selftest.checks import examine
    from cluster.session.placement import declared, student_bundle

    bundle = student_bundle(plan.config, declared())
    amounts = {"num_cpus": bundle.pop("CPU", 0), "num_gpus": bundle.pop("GPU", 0)}
    task = ray.remote(examine).options(**amounts, resources=bundle, max_retries=0)
    try:
        return ray.get(task.remote(plan, open_reader))
    except RayTaskError as error:
        if isinstance(error.cause, TutelageError):
            raise error.cause from None
        raise


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder that every node sees where the cache is shared, and that does not stay."""
    folder = cache / "selftest" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
