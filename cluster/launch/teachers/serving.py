"""Where answers come from: a service of the run's own, one that is running, or a store on disk."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.launch.teachers.filling import filled_domains
from cluster.launch.teachers.following import following
from cluster.launch.teachers.modules import with_modules
from cluster.launch.teachers.similarity import with_similarity
from cluster.launch.teachers.stored import no_validation_answers, stored_part
from cluster.launch.teachers.watch import restarts_of, using, when_gone
from cluster.planning.difficulty import ScoringModel, centre_of
from cluster.planning.keeping import budget_note, exceeds_budget
from cluster.planning.ordering import ordered_domains
from cluster.planning.preparation import Launch, refuse_unfit, run_plan
from cluster.planning.projecting import projection_of
from cluster.report.outcome import count
from shared.config.models.student import QLoRATraining
from shared.config.models.teachers import Autoscaling, Teacher
from shared.config.paths import without_job_folder
from shared.config.run import Config
from shared.errors import ConfigError, StorageError
from shared.prompts.prefix import DocumentOpenings, PromptedReader
from shared.run.plan import OpenReader, OpenRunReader, RunPlan, open_routing
from shared.run.run_dir import append_progress
from shared.store.readers import RecordingReader, StoreReader
from shared.store.target_store import stored_answers
from shared.targets.asks.ask import IdsEncoding
from shared.targets.asks.head_location import ShippedHead, find_head
from shared.targets.question import Question
from shared.targets.reader import TargetReader
from teacher_service.engine.description import TeacherDescription
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from teacher_service.service.scaling.policy import in_words


@contextmanager
def teaching(launch: Launch) -> Iterator[tuple[RunPlan, OpenRunReader]]:
    """The plan, and a way to its teachers that works for the length of a `with`."""
    if launch.config.targets.teacher_free:
        yield _from_store(launch)
        return
    with asking(launch) as (plan, live):
        if note := budget_note(launch.prepared, instead="the teacher is asked each time"):
            print(note, flush=True)
        readers = {
            name: _prompted(launch, _recorded(launch, live[name], part))
            for name, part in plan.by_teacher.items()
        }
        yield plan, partial(open_routing, plan=plan, readers=readers)


@contextmanager
def asking(launch: Launch) -> Iterator[tuple[RunPlan, Mapping[str, OpenReader]]]:
    """The plan, and by teacher a way to it past any store and without prompts, for the length of a
    `with`."""
    services = launch.services or own_services(launch)
    with ExitStack() as stack:
        if launch.services is None:
            stack.callback(_stop, services.values())
        begun = {name: _begun(launch.taught_by(name), services[name]) for name in services}
        stack.enter_context(using([*services.values()], launch.run_dir, gone=when_gone(launch)))
        served = {
            name: _asked(launch.taught_by(name), services[name], begun[name].described())
            for name in services
        }
        live = {name: open_reader for name, (_, open_reader) in served.items()}
        parts = {name: part for name, (part, _) in served.items()}
        scorers = {
            name: ScoringModel(
                "teacher",
                _fingerprint(part),
                partial(nullcontext, _prompted(launch, live[name])),
            )
            for name, part in parts.items()
        }
        plan = RunPlan.joined(launch.config, launch.prepared.domains, parts)
        plan = _by_scores(launch, plan, teachers=scorers)
        if launch.trains and launch.config.augmentation.fills:
            filled = filled_domains(launch.prepared, plan.domains, teachers=scorers)
            plan = replace(plan, domains=filled)
        before = sum(map(restarts_of, services.values()))
        try:
            yield plan, live
        finally:
            restarts = sum(map(restarts_of, services.values())) - before
            with suppress(StorageError):  # a full disk must not hide what stopped the run
                count(launch.run_dir, "teacher_restarts", restarts)


def _stop(names: Iterable[str]) -> None:
    for name in names:
        service.stop(name)


def own_services(launch: Launch) -> dict[str, str]:
    """Names of the services that a run starts for its teachers, by teacher."""
    name = f"{launch.namespace}-teacher"
    teachers = launch.config.teachers
    return {t: f"{name}-{t}" if len(teachers) > 1 else name for t in teachers}


def _asked(
    launch: Launch, name: str, description: TeacherDescription
) -> tuple[RunPlan, OpenReader]:
    """The plan of one teacher's part, and a way to the service of that name."""
    refuse_unfit(launch.config, description, width=launch.prepared.facts.width)
    for note in description.notes:
        print(note, flush=True)
    fingerprint = description.fingerprint
    live = _live(launch, name, fingerprint)
    plan = run_plan(
        launch.prepared,
        run_dir=launch.run_dir.path,
        teacher=fingerprint,
        projection=projection_of(launch.prepared, fingerprint, _prompted(launch, live)),
        head=_shipped_head(launch.config, name),
    )
    return replace(plan, teacher_weights=description.num_weights), live


def _fingerprint(part: RunPlan) -> dict[str, str]:
    assert part.teacher is not None, "a live teacher has a fingerprint"
    return part.teacher


def _begun(launch: Launch, name: str) -> service.Starting:
    """The service of one teacher, which loads where it is the run's own."""
    teacher = launch.prepared.teacher
    if launch.services is not None:
        refuse_other_teacher(name, teacher)
        return service.running(name)
    copies = f"{teacher.fewest} x " if teacher.fewest > 1 else ""
    more = f"; {in_words(teacher.replicas)}" if isinstance(teacher.replicas, Autoscaling) else ""
    model = without_job_folder(teacher.model)
    print(f"loading the teacher, {copies}{model}{more}", flush=True)
    cache, context = launch.config.paths.cache, _longest_rows(launch)
    (load,) = (launch.engines.get(own) for own in launch.config.teachers)
    make_engine = partial(load or service.default_engine, teacher, cache, context)
    return service.start(
        name,
        teacher,
        detached=False,
        cache=cache,
        context=context,
        make_engine=with_similarity(launch, following(launch, with_modules(launch, make_engine))),
    )


def _longest_rows(launch: Launch) -> int:
    """Tokens of the longest row that a teacher may be asked about."""
    across = launch.prepared.across
    if across is not None:
        return across.longest
    shown = [opening.longest for opening in launch.prepared.showing.openings.values()]
    return launch.config.data.context + max(shown, default=0)


def _shipped_head(config: Config, name: str) -> ShippedHead | None:
    """The teacher's head, in the cache that students read, where the config asks for it."""
    if config.targets.exact is None:
        return None
    head = service.ship_head(name)
    find_head(config.paths.cache, head.digest)
    return head


def refuse_other_teacher(name: str, asked: Teacher) -> None:
    """Refuse a running service that is not the config's teacher. Raises ConfigError."""
    serving = service.status(name).teacher
    if serving is None:
        raise ConfigError(
            f"teacher service {name} is half dead; remove it with `tutelage teacher down` and "
            "start it again with `tutelage teacher up`"
        )
    decisive = (
        "model",
        "revision",
        "adapter",
        "adapter_revision",
        "dtype",
        "attention",
        "quantisation",
        "engine",
    )
    for option in decisive:
        if getattr(serving, option) != getattr(asked, option):
            raise ConfigError(
                f"teacher service {name} serves {option} {getattr(serving, option)}, the config "
                f"asks for {getattr(asked, option)}; name another service with --service, or "
                "change teachers"
            )


def pool_settings(
    config: Config, service: str, *, teacher: dict[str, str], client: str, own: bool
) -> dict[str, Any]:
    """How a config's pools ask a service, less their rank; `own` is one that the command itself has
    started."""
    asked = config.service
    return {
        "service": service,
        "teacher": teacher,
        "run": client,
        "in_flight": asked.in_flight,
        "unit_deadline_s": asked.unit_deadline_s,
        "max_unit_failures": asked.max_unit_failures,
        "own": own,
    }


def _live(launch: Launch, name: str, fingerprint: dict[str, str]) -> OpenReader:
    """A way to a running service, past any store."""
    own = launch.services is None or name not in launch.services.values()
    client = str(launch.run_dir.path)
    settings = pool_settings(launch.config, name, teacher=fingerprint, client=client, own=own)
    return partial(open_pool, **settings, say=partial(append_progress, launch.run_dir))


def _recorded(launch: Launch, live: OpenReader, part: RunPlan) -> OpenReader:
    """What training reads: through `targets.store` where there is one."""
    targets = launch.config.targets
    if targets.store is None:
        return live
    unkept = part.validation_question if exceeds_budget(launch.prepared) else None
    return partial(
        _open_recording,
        open_live=live,
        store=targets.store,
        teacher=_fingerprint(part),
        ids=targets.store_ids,
        unkept=unkept,
    )


def _prompted(launch: Launch, open_reader: OpenReader) -> OpenReader:
    """The same with the teacher shown the run's prompts; stores know what was sent."""
    openings = launch.prepared.showing.openings
    return partial(_open_prompted, open_plain=open_reader, openings=openings)


def _open_prompted(
    rank: int, *, open_plain: OpenReader, openings: Mapping[str, DocumentOpenings]
) -> TargetReader:
    return PromptedReader(open_plain(rank), openings)


def _open_recording(
    rank: int,
    *,
    open_live: OpenReader,
    store: str,
    teacher: dict[str, str],
    ids: IdsEncoding | None,
    unkept: Question | None,
) -> TargetReader:
    return RecordingReader(open_live(rank), store, teacher=teacher, ids=ids, unkept=unkept)


def _open_stored(rank: int, *, store: str, teacher: dict[str, str] | None) -> TargetReader:
    return StoreReader(store, teacher=teacher)


def _by_scores(launch: Launch, plan: RunPlan, *, teachers: Mapping[str, ScoringModel]) -> RunPlan:
    """The plan with what the teachers' scores of all training rows decide: the orders that its
    phases need, and the centre of its weighting."""
    statistic = launch.config.weighting.scored_centre
    if statistic is not None:
        centre = centre_of(launch.prepared, statistic, teachers=teachers)
        plan = replace(plan, scored_centre=centre)
    progressive = launch.config.progressive
    if progressive is None:
        return plan
    student = starting_student(launch) if progressive.difficulty == "gap" else None
    domains = ordered_domains(
        launch.prepared,
        progressive.difficulty,
        parts=progressive.phases,
        teachers=teachers,
        student=student,
    )
    return replace(plan, domains=domains)


def starting_student(launch: Launch) -> ScoringModel:
    """The student as it starts, as something that scores rows."""
    from teacher_service.engine.loading import local_folder, weights_digest

    student, asked = launch.config.student, served_student(launch.config)
    settings = asked.model_dump(include={"model", "revision", "dtype", "quantisation"})
    identity = {name: str(value) for name, value in settings.items()}
    if student.attention != "auto":
        identity["attention"] = student.attention
    folder = local_folder(student.model, revision=student.revision, marker="config.json")
    identity["model"] = weights_digest(folder)
    serve = None if launch.config.targets.teacher_free else partial(_served, launch, asked)
    return ScoringModel("student", identity, serve)


def served_student(config: Config) -> Teacher:
    """The student as it starts, as a service serves it: a replica in each worker's place."""
    student = config.student
    return Teacher(
        model=student.model,
        revision=student.revision,
        dtype=student.dtype,
        attention=student.attention,
        quantisation="nf4" if isinstance(student.train, QLoRATraining) else "none",
        trust_remote_code=student.trust_remote_code,
        replicas=config.fewest_workers,
        gpus=student.gpus,
        cpus=student.cpus,
    )


@contextmanager
def _served(launch: Launch, student: Teacher) -> Iterator[OpenReader]:
    with student_served(launch, student, purpose="to score its rows") as (name, fingerprint):
        yield _live(launch, name, fingerprint)


@contextmanager
def student_served(
    launch: Launch, student: Teacher, *, purpose: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and fingerprint of a service of a student in its workers' places, for the length of a
    `with`."""
    name = f"{launch.namespace}-student"
    with student_service(launch.config, name, student, purpose=purpose) as description:
        yield name, description.fingerprint


@contextmanager
def student_service(
    config: Config, name: str, student: Teacher, *, purpose: str
) -> Iterator[TeacherDescription]:
    """A service of a student, by its name, for the length of a `with`."""
    loaded = " + ".join(
        without_job_folder(part) for part in (student.model, student.adapter) if part
    )
    print(f"loading the student, {loaded}, {purpose}", flush=True)
    try:
        yield service.start(
            name,
            student,
            detached=False,
            role="student",
            cache=config.paths.cache,
            context=config.data.context,
        ).described()
    finally:
        service.stop(name)


def _from_store(launch: Launch) -> tuple[RunPlan, OpenRunReader]:
    """No teacher alive; validation is compared with one where its answers are stored too."""
    store = launch.config.targets.store
    assert store is not None, "the config asks for a store with teacher_free"
    answers = stored_answers(store)
    found = {
        name: stored_part(launch.taught_by(name), store, answers) for name in launch.config.teachers
    }
    parts = {name: part for name, (part, _) in found.items()}
    plan = RunPlan.joined(launch.config, launch.prepared.domains, parts)
    if plan.validation_question is None and launch.config.decides_from_validation:
        raise ConfigError(no_validation_answers(launch.config, store))
    scorers = {
        name: ScoringModel("teacher", teacher or {}, None) for name, (_, teacher) in found.items()
    }
    plan = _by_scores(launch, plan, teachers=scorers)
    readers = {
        name: _prompted(launch, partial(_open_stored, store=store, teacher=teacher))
        for name, (_, teacher) in found.items()
    }
    return plan, partial(open_routing, plan=plan, readers=readers)
