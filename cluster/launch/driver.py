"""The driver: teachers up, controller up, students trained, everything down again in order.

It carries no tokens: students ask teachers directly, and rank 0 alone talks to the controller.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.launch.continuing import changes_in_words, has_ended
from cluster.launch.teachers.lessons import modules_of
from cluster.launch.teachers.modules import refuse_shared_service
from cluster.launch.writing import teachers_of
from cluster.planning.notes import notes
from cluster.planning.preparation import (
    Launch,
    Prepared,
    prepare_run,
    refuse_unasked,
    refuse_unreached,
)
from cluster.planning.room import beside_students, refuse_unplaceable, refuse_unplaceable_early
from cluster.report.outcome import conclude, count, interrupted
from cluster.report.stages import begin
from cluster.report.summary import final_table
from cluster.report.text import text_lines, text_of, write_text
from cluster.session.interrupts import interrupted_as
from cluster.session.services import named_services, reached, services_of
from cluster.session.session import connected, prepare_environment
from shared.config.file import dump
from shared.config.losses import CrossEntropy, RouterBalance
from shared.config.models.modules import as_loaded
from shared.config.models.rollouts import RolloutService
from shared.config.run import Config
from shared.config.selectors import selector_note, student_ids_note
from shared.config.text.augmentation import Augmentation
from shared.config.weighting import Uniform
from shared.errors import StoppedError, StorageError
from shared.run.environment import write_environment
from shared.run.exporter import exporting
from shared.run.plan import Assignment, OpenController, OpenRunReader, RunPlan
from shared.run.run_dir import RunDir, locked, open_run, write_atomically
from shared.run.start import StartClock
from shared.targets.payload import Pair, bytes_per_token, payload_note
from shared.targets.question import Question
from student_trainer.state.checkpoint import refuse_fewer_steps
from student_trainer.tracking.services import refuse_unready

if TYPE_CHECKING:
    from cluster.launch.generating import GenerationLimits
    from cluster.launch.students.training import Students

CONTROLLER_DEADLINE_S = 120.0


def run(
    config: Config,
    *,
    fresh: bool = False,
    address: str | None = None,
    clock: StartClock | None = None,
) -> RunDir:
    """Distil, from teacher to report, in one job; the same call again continues or is done.

    `config` is resolved; `clock` began with the command. Raises UserErrors before anything starts
    and TutelageErrors later; what is done by then stays, and the same call continues it.
    """
    clock = clock or StartClock()
    with _launched(config, fresh=fresh, services=None, address=address, clock=clock) as launch:
        if launch is not None:
            _distil(launch)
    return run_dir_of(config)


def train(
    config: Config,
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
    clock: StartClock | None = None,
) -> RunDir:
    """Like `run`, with teacher services that are running already (`tutelage teacher up`); `service`
    is the name of the only one, or TEACHER=SERVICE for each of several, with commas between."""
    refuse_shared_service(config)
    services = services_of(config, service) or named_services(config)
    clock = clock or StartClock()
    with _launched(config, fresh=fresh, services=services, address=address, clock=clock) as launch:
        if launch is not None:
            _distil(launch)
    return run_dir_of(config)


def evaluate(
    config: Config,
    limits: "GenerationLimits",
    *,
    service: str | None = None,
    address: str | None = None,
) -> Prepared:
    """Compare the run's export, made anew where it is older than the newest checkpoint, with its
    teacher, as `evaluation.json` and the latest documents in the run's folder have it; returns
    what was prepared. A run without either is evaluated as it begins. Teacher, student before and
    after write within `limits`, as the run's generations have it."""
    from cluster.launch.generating import Generating
    from cluster.launch.teachers.serving import teaching
    from student_trainer.state.export import newest_export  # slow, as transformers is
    from student_trainer.tasks.registry import task_of

    prepare_environment()
    config = config.model_copy(update={"rollouts": RolloutService()})  # only training writes
    run_dir, services = run_dir_of(config), services_of(config, service)
    with locked(run_dir), reached(address, services):
        refuse_unplaceable_early(config, services)
        attempt = run_dir.new_attempt()
        launch = Launch(prepare_run(config), run_dir, attempt, services, trains=False)
        with connected(address):
            refuse_unplaceable(launch)
            export = newest_export(run_dir, config, task_of(config).model)
            generating = Generating(launch, limits, export)
            group = _students(launch, export=export)
            with group as students, teaching(launch) as (plan, open_reader):
                evaluating = replace(plan, mode="evaluate")
                _train(students, Assignment(evaluating, open_reader, _replayed(launch)))
                generating.ask_teachers(plan)
            generating.ask_students()
            generating.write()
    return launch.prepared


def run_dir_of(config: Config) -> RunDir:
    """Where a resolved config's run lives."""
    return RunDir(Path(config.paths.runs) / config.name)


@contextmanager
def _launched(
    config: Config,
    *,
    fresh: bool,
    services: Mapping[str, str] | None,
    address: str | None,
    clock: StartClock,
) -> Iterator[Launch | None]:
    """Locked, prepared, recorded and on a cluster; None where the run is finished, whose table is
    printed. What is running already is looked at before any work, what is not starts after it."""
    clock.mark("began")
    clock.mark("loaded")
    prepare_environment()
    run_dir = run_dir_of(config)
    with locked(run_dir), interrupted_as(partial(interrupted, run_dir)):
        if not fresh:
            refuse_fewer_steps(run_dir.checkpoints, steps=config.steps)
        if not fresh and _is_finished(run_dir, config):
            finished = open_run(config)
            print(f"{config.name} is finished; --fresh starts it over\n")
            _print_table(finished)
            yield None
        else:
            with reached(address, services):
                launch = _prepared(config, fresh=fresh, services=services, clock=clock)
                with connected(address):
                    clock.mark("connected")
                    yield launch


def _prepared(
    config: Config, *, fresh: bool, services: Mapping[str, str] | None, clock: StartClock
) -> Launch:
    begin("start")
    refuse_unasked(config)
    refuse_unreached(config)
    refuse_unready(config.trackers)
    refuse_unplaceable_early(config, services)
    prepared = prepare_run(config)
    changes = [] if fresh else changes_in_words(run_dir_of(config), config)
    run_dir = open_run(config, fresh=fresh)
    print("\n".join([*changes, ""]), end="")
    print(f"run folder {run_dir.path}", flush=True)
    found = text_of(config, prepared.domains, notes=prepared.showing.notes)
    write_text(run_dir, found)
    print("\n".join(text_lines(found)), flush=True)
    for note in notes(prepared):
        print(note, flush=True)
    run_dir.start.unlink(missing_ok=True)
    clock.mark("prepared")
    return Launch(prepared, run_dir, run_dir.new_attempt(), services, clock)


def _is_finished(run_dir: RunDir, config: Config) -> bool:
    return has_ended(run_dir, config) and (
        has_ended(run_dir.baseline, config) or not config.baseline
    )


def _distil(launch: Launch) -> None:
    import ray
    import ray.util.metrics

    from cluster.launch.pairing import with_pairs
    from cluster.launch.teachers.serving import teaching

    refuse_unplaceable(launch)
    write_environment(launch.run_dir, cluster=ray.cluster_resources())
    try:
        with exporting(ray.util.metrics, run=launch.config.name), ExitStack() as stack:
            done = has_ended(launch.run_dir, launch.config)
            if launch.run_dir.finished and not done:
                conclude(launch.run_dir, status="interrupted")
            learning = None if done else stack.enter_context(learners(launch))
            plan, open_reader = stack.enter_context(teaching(launch))
            for name, part in plan.by_teacher.items():
                if part.training_question is not None:
                    _say_price(launch.taught_by(name), part, part.training_question)
            if learning is not None:
                plan = with_pairs(launch, plan)
                begin("students")
                learning(plan, open_reader)
                conclude(launch.run_dir, status="finished")
            if launch.config.baseline:
                _train_baseline(launch, plan, open_reader)
        conclude(launch.run_dir, status="finished")  # now the teacher's restarts are counted
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | StoppedError)
        with suppress(StorageError):  # a full disk must not hide what stopped the run
            conclude(launch.run_dir, status="interrupted" if stopped else "failed")
        raise
    _print_table(launch.run_dir)


def _say_price(launch: Launch, plan: RunPlan, spec: Question) -> None:
    if launch.config.task.classifies:
        size = sum(bytes_per_token(spec, hidden_width=0).values())
        unit, asked = launch.config.task.unit, spec.ask.in_words()
        print(f"a {unit} costs {size:,.0f} bytes from the teacher: {asked}", flush=True)
        return
    facts = launch.prepared.facts
    pair = Pair(facts.width, facts.rows, launch.prepared.teacher.dtype)
    width, top_k = plan.teacher_width or 0, min(plan.config.targets.top_k, facts.shared_vocab)
    if plan.config.targets.exact is None:
        asked, losses = plan.config.targets, plan.config.losses
        picked = plan.config.selector_for(spec.ask.shared_vocab)
        own = asked.student_ids
        note = selector_note(asked.selector, picked, losses, asked.top_k, student_ids=own)
        print(note, flush=True)
        if own:
            print(student_ids_note(own), flush=True)
    print(payload_note(spec, hidden_width=width, pair=pair, top_k=top_k), flush=True)


@contextmanager
def learners(launch: Launch) -> Iterator[Callable[[RunPlan, OpenRunReader], None]]:
    """The controller and the students of a run, and copies of them that write, who come up while
    its teacher does; what is yielded trains them."""
    from cluster.rollouts.serving import writing

    with (
        _controller(launch) as controller,
        _students(launch) as students,
        writing(launch) as writes,
    ):

        def learn(plan: RunPlan, open_reader: OpenRunReader) -> None:
            launch.clock.mark("planned")
            teachers = teachers_of(launch, plan) if plan.config.source.teachers_write else None
            given = (plan, open_reader, controller(), launch.clock, launch.work)
            written = (writes(), teachers, modules_of(launch, plan))
            _train(students, Assignment(*given, *written))

        yield learn


@contextmanager
def _controller(launch: Launch) -> Iterator[Callable[[], OpenController]]:
    """The controller of a run, for the length of a `with`; what is yielded waits until it is up."""
    from cluster.control import controller

    name, mixture = controller_of(launch.config), launch.config.mixture
    plan = controller.ControllerPlan(
        config=launch.config,
        natural=tuple(domain.natural_weight for domain in launch.prepared.domains),
        log_path=str(launch.run_dir.weight_log),
    )
    named = {"namespace": launch.namespace, "deadline_s": CONTROLLER_DEADLINE_S}
    opened = partial(
        controller.open_controller,
        name,
        namespace=launch.namespace,
        deadline_s=getattr(mixture, "deadline_s", CONTROLLER_DEADLINE_S),
    )
    actor = controller.begin_controller(plan, name=name, **named)

    def ready() -> OpenController:
        controller.await_controller(actor, name=name, deadline_s=CONTROLLER_DEADLINE_S)
        return opened

    try:
        yield ready
    finally:
        controller.stop_controller(name, namespace=launch.namespace)


def controller_of(config: Config) -> str:
    """Name of the controller of a run."""
    return f"controller({config.name})"


def _replayed(launch: Launch) -> OpenController:
    """Serves what the run decided, so that the same rows are drawn."""
    from cluster.control.controller import ReplayController

    log = str(launch.run_dir.weight_log)
    return partial(ReplayController, log, tuple(launch.config.domains))


@contextmanager
def _students(
    launch: Launch, baseline: Config | None = None, *, export: Path | None = None
) -> Iterator["Students"]:
    """Workers of a run, or of its baseline, that come up at once and wait for their assignment;
    with `export` they hold the student in that folder."""
    from cluster.launch.students.tracking import keeper_of
    from cluster.launch.students.training import Training, students
    from cluster.session.placement import declared, student_bundle

    config = baseline or launch.config
    training = Training(
        config=config,
        run_dir=(launch.run_dir.baseline if baseline else launch.run_dir).path,
        bundle=student_bundle(config, declared()),
        attempt=launch.attempt,
        keeper=keeper_of(controller_of(launch.config), namespace=launch.namespace),
        export=export,
    )
    with students(training) as group:
        if not launch.serves_student:  # which takes the workers' places first
            beside = beside_students(launch.config, launch.services, declared())
            group.start(beside=[] if baseline else beside)
        yield group


def _train(students: "Students", assignment: Assignment) -> None:
    run_dir = RunDir(Path(assignment.plan.run_dir))
    count(run_dir, "student_restarts", students.train(assignment))


def _train_baseline(launch: Launch, plan: RunPlan, open_reader: OpenRunReader) -> None:
    """The same student on the same rows with hard labels alone, compared with the same teacher."""
    begin("baseline")
    run_dir = launch.run_dir.baseline
    for folder in (run_dir.path, run_dir.logs, run_dir.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir.weight_log, launch.run_dir.weight_log.read_text())
    if plan.config.prompts is not None:
        write_atomically(run_dir.prompts, launch.run_dir.prompts.read_text())
    config = on_hard_labels(plan.config)
    write_atomically(run_dir.config, dump(_at(run_dir, config)))
    hard = replace(
        plan,
        config=config,
        run_dir=str(run_dir.path),
        training_question=None,
        teacher_width=None,
        replays=True,
    )
    with _students(launch, baseline=config) as students:
        _train(students, Assignment(hard, open_reader, _replayed(launch)))
    conclude(run_dir, status="finished")
    conclude(launch.run_dir, status="finished")


def on_hard_labels(config: Config) -> Config:
    """The config of a copy that asks no teacher in training, so that documents stay as they are:
    what is changed, nobody else labels."""
    targets = config.targets.model_copy(update={"student_ids": 0})
    routed = [loss for loss in config.losses if isinstance(loss, RouterBalance)]
    alone = {
        "losses": [CrossEntropy(), *routed],
        "weighting": Uniform(),
        "augmentation": Augmentation(),
        "targets": targets,
        "teachers": as_loaded(config.teachers),
        "baseline": False,
    }
    return config.model_copy(update=alone)


def _at(run_dir: RunDir, config: Config) -> Config:
    """The config by which other commands find a run directory again."""
    paths = config.paths.model_copy(update={"runs": str(run_dir.path.parent)})
    return config.model_copy(update={"name": run_dir.path.name, "paths": paths})


def _print_table(run_dir: RunDir) -> None:
    print(final_table(run_dir.path), flush=True)
