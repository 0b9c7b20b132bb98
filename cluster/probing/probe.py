"""A probe: the first steps of a run in its own processes, counted, in a folder that does not
stay."""

import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import psutil

from cluster.planning.folders import INDEX, WEIGHTS
from cluster.probing.longest import longest_steps
from cluster.sizing.estimate import Estimate, Side
from cluster.sizing.fitting import machine_total
from cluster.sizing.measured import Probe, read
from shared.config.adaptive_losses import writes_pairs
from shared.config.mixture import FixedMixture
from shared.config.models.modules import as_loaded
from shared.config.run import Config
from shared.config.weighting import as_unscored
from shared.errors import ConfigError, TutelageError
from shared.in_words import in_bytes

OWN_STEPS = 20  # of the run's own rows, after those of the longest


def probe(found: Estimate, *, address: str | None = None) -> Probe:
    """Take a config's first steps on a cluster and return what its processes took.

    What is printed on the way goes to stderr. Raises UserErrors before anything starts, and what a
    run raises; nothing but prepared rows is left behind.
    """
    refuse_unprobed(found)
    with scratch(Path(found.config.paths.cache)) as folder, redirect_stdout(sys.stderr):
        print(f"probing {found.config.name}: {OWN_STEPS} steps and the longest rows", flush=True)
        steps = longest_steps(len(found.config.teachers)) + OWN_STEPS
        _run(found, folder, steps=steps, address=address)
        measured = read(folder, found.config.teachers, num_steps=steps)
    refuse_unbounded(measured)
    return measured


def refuse_unbounded(measured: Probe) -> None:
    """Raise TutelageError where a side made a tensor of more logits than a chunk has."""
    for side, logits in measured.unbounded():
        raise TutelageError(
            f"{side} made a tensor of {logits.widest:,} x {logits.vocabulary:,} logits in a probe, "
            f"where a chunk has {logits.chunk:,} positions at most: its memory grows with "
            "batch.micro_batch and data.context more than planned; lower them, and report the model"
        )


def refuse_unprobed(found: Estimate) -> None:
    """Refuse what cannot be run here: models without weights, more memory than is free, models that
    write, teachers that change, and a teacher in a process apart. Raises ConfigError."""
    config = found.config
    if not config.source.is_dataset:
        raise ConfigError(
            f"source has {config.source.written_in_words}, and a probe takes steps of the data set "
            "alone; plan without --probe, or probe with source=dataset"
        )
    if writes_pairs(config.losses):
        raise ConfigError(
            "losses has a preference whose pairs are written, and a probe takes steps of the data "
            "set alone; plan without --probe, or probe with pairs=given"
        )
    for name, teacher in config.teachers.items():
        if teacher.apart:
            raise ConfigError(
                f"teachers.{name}.engine is {teacher.engine}, whose process a probe does not look "
                "into; plan without --probe, or probe with engine=transformers"
            )
        if teacher.online_modules is not None:
            raise ConfigError(
                f"teachers.{name}.online_modules learn beside the student, and a probe takes steps "
                f"without them; plan without --probe, or probe with "
                f"teachers.{name}.online_modules=null"
            )
        if teacher.follow_student is not None:
            raise ConfigError(
                f"teachers.{name}.follow_student has the student's weights loaded beside the "
                f"steps, and a probe takes steps with the teacher as it begins; plan without "
                f"--probe, or probe with teachers.{name}.follow_student=null"
            )
    models = {f"teachers.{name}.model": t.model for name, t in config.teachers.items()}
    for option, model in {**models, "student.model": config.student.model}.items():
        folder = Path(model)
        if folder.is_dir() and not any(folder.glob(WEIGHTS)) and not (folder / INDEX).exists():
            raise ConfigError(
                f"{option} is {model}, a folder without weights (*.safetensors), and --probe runs "
                "it; get its weights, or plan without --probe"
            )
    needed, free = machine_total(found), psutil.virtual_memory().available
    if any(side.gpus == 0 for side in found.sides) and needed > free:
        raise ConfigError(
            f"a probe takes about {in_bytes(needed)}, as the run does, and {in_bytes(free)} of "
            "this machine are free; end what takes them, or plan without --probe"
        )


def refuse_without_gpu(config: Config, available: float) -> None:
    """Refuse a config on GPUs where there is none. Raises ConfigError."""
    asked = {f"teachers.{name}.gpus": teacher.gpus for name, teacher in config.teachers.items()}
    for option, gpus in {**asked, "student.gpus": config.student.gpus}.items():
        if gpus and not available:
            raise ConfigError(
                f"{option} is {gpus:g}, and a probe runs it where no GPU is; set {option}=0 "
                "(gpus: 0), probe where the GPUs are, or plan without --probe (--gpu NAME)"
            )


def probed(config: Config, folder: Path, *, steps: int) -> Config:
    """A config's pair, payload, losses and rows in a run of so many steps below `folder`, without
    what would decide, compare or be kept, and without answers from disk."""
    mixture = config.mixture if isinstance(config.mixture, FixedMixture) else FixedMixture()
    targets = config.targets
    if not targets.teacher_free:
        targets = targets.model_copy(update={"store": None})
    return config.model_copy(
        update={
            "steps": steps,
            "paths": config.paths.model_copy(update={"runs": str(folder)}),
            "targets": targets,
            "teachers": as_loaded(config.teachers),
            "mixture": mixture,
            "progressive": None,
            "weighting": as_unscored(config.weighting),
            "augmentation": config.augmentation.by_rules,
            "baseline": False,
            "trackers": [],
        }
    )


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A folder that every node sees where the cache is shared, and that does not stay."""
    folder = cache.expanduser() / "probes" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _removed_on_interrupt(folder: Path) -> Iterator[None]:
    """Leave no folder where an interrupted command ends at once, past what would remove it."""
    try:
        yield
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(found: Estimate, folder: Path, *, steps: int, address: str | None) -> None:
    from cluster.launch.driver import learners, run_dir_of
    from cluster.launch.teachers.serving import teaching
    from cluster.planning.preparation import Launch, prepare_run
    from cluster.planning.room import refuse_unplaceable, refuse_unplaceable_early
    from cluster.probing.following import Chunks
    from cluster.probing.student import probe_student
    from cluster.probing.teacher import probed_engine
    from cluster.session.placement import gpus_here
    from cluster.session.services import reached
    from cluster.session.session import connected, prepare_environment
    from shared.run.run_dir import locked, open_run

    config = probed(found.config, folder, steps=steps)
    prepare_environment()
    shared = found.wire.shared_vocab if found.wire else found.student.sizes.vocabulary

    def chunks(side: Side) -> Chunks:
        return Chunks((side.sizes.vocabulary, shared), side.sizes.width, side.chunk_rows)

    with locked(run_dir_of(config)), reached(address, None):
        refuse_without_gpu(config, gpus_here())
        refuse_unplaceable_early(config, None)
        prepared = prepare_run(config)
        run_dir = open_run(config)
        launch = Launch(
            prepared,
            run_dir,
            run_dir.new_attempt(),
            services=None,
            engines={
                side.name: partial(
                    probed_engine, name=side.name, chunks=chunks(side), folder=folder
                )
                for side in found.teachers
            },
            work=partial(probe_student, chunks=chunks(found.student), folder=folder),
        )
        with connected(address), _removed_on_interrupt(folder):
            refuse_unplaceable(launch)
            with learners(launch) as learn, teaching(launch) as (plan, open_reader):
                learn(plan, open_reader)
