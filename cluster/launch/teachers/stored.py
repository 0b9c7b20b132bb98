"""What a store on disk holds of a run's teachers: the plan of a part, and who answered it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.planning.keeping import bucketed
from cluster.planning.preparation import Launch, run_plan
from cluster.planning.projecting import passes_projection
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.plan import RunPlan
from shared.store.target_store import StoredAnswers, stored_teacher
from shared.targets.asks.head_location import ShippedHead, find_head
from shared.targets.asks.last_states import LastStates
from shared.targets.question import Question


def stored_part(
    launch: Launch, store: str, answers: list[StoredAnswers]
) -> tuple[RunPlan, dict[str, str] | None]:
    """The plan of one teacher's part, and the fingerprint of the one whose answers are stored;
    None where no loss asks for any."""
    config, named = launch.config, _names(launch.prepared.teacher)
    specs = [a.question for a in answers if a.is_of(named)] or [a.question for a in answers]
    prompts = launch.prepared.showing.prompts
    head = _stored_head(config, [spec for spec in specs if spec.prefix == prompts])
    planned_for = partial(run_plan, run_dir=launch.run_dir.path, head=head)
    planned = partial(planned_for, launch.prepared)
    plan = planned(teacher={"store": store})
    if plan.training_question and passes_projection(launch.prepared):
        projection = _stored_projection(store, specs, plan.training_question)
        planned_for = partial(planned_for, projection=projection)
        planned = partial(planned_for, launch.prepared)
        plan = planned(teacher={"store": store})
    teacher = (
        stored_teacher(store, plan.training_question, named=named)
        if plan.training_question
        else None
    )
    held = [a.question for a in answers if teacher is None or a.teacher == teacher]
    if plan.validation_question not in held:  # they may be kept within a budget
        narrow = replace(launch.prepared, config=bucketed(config))
        other = planned_for(narrow, teacher={"store": store})
        plan = other if other.validation_question in held else planned(teacher=None)
        plan = replace(plan, config=config)
    return plan, teacher


def _names(teacher: Teacher) -> dict[str, str]:
    """What a config alone says of its teacher, as fingerprints have it: its files need not be
    there, so that two of one name are told apart by who fills a store."""
    return {
        "model": Path(teacher.model).name,
        "adapter": Path(teacher.adapter or "").name,
        "dtype": teacher.dtype,
        "quantisation": teacher.quantisation,
    }


def _stored_projection(store: str, specs: list[Question], asked: Question) -> str:
    """The projection of the states that are stored of what is asked, "" where there are none.
    Raises ConfigError where there are several."""
    found = {
        spec.hidden.projection
        for spec in specs
        if spec.hidden.projection and _unprojected(spec) == asked
    }
    if len(found) > 1:
        raise ConfigError(
            f"targets.store {store} has the same hidden states through {len(found)} projections; "
            "see `tutelage cache ls` and remove all but one with `tutelage cache gc --question`"
        )
    return next(iter(found), "")


def _unprojected(question: Question) -> Question:
    return replace(question, hidden=replace(question.hidden, projection=""))


def _stored_head(config: Config, specs: list[Question]) -> ShippedHead | None:
    """The head that stored states stand before, where the config asks for it."""
    if config.targets.exact is None:
        return None
    for spec in specs:
        ask = spec.ask
        if isinstance(ask, LastStates):
            path = find_head(config.paths.cache, ask.head)
            return ShippedHead(ask.head, ask.states, ask.width, path.stat().st_size)
    raise ConfigError(
        f"targets.store {config.targets.store} holds no last hidden states, which targets.exact "
        "asks for; `tutelage capture CONFIG` fills it"
    )


def no_validation_answers(config: Config, store: str) -> str:
    """Why a run that compares on validation text cannot do so, and the way out."""
    what = "progressive.plateau is set"
    way_out = "set progressive.max_steps and progressive.plateau=null"
    if config.mixture.needs_validation:
        what = f"mixture.policy is {config.mixture.policy}"
        way_out = "use doremi, odm or fixed weights"
    return (
        f"{what}, which compares with the teacher on validation text, but targets.store {store} "
        f"has no answers to it; {way_out}, or use a live teacher"
    )
