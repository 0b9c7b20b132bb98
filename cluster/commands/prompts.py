"""`tutelage prompts optimise`: every domain's search on a teacher service, and what it wrote."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cluster.planning.tasks.classes import refuse_classifier, refuse_entities
from cluster.planning.tasks.images import refuse_images
from cluster.prompt_search.search import Material, Outcome, search
from cluster.prompt_search.splits import Task, task_of
from cluster.prompt_search.teacher import Teacher, refuse_unfit, rewrite, scorer_for
from shared.config.models.teachers import Teacher as TeacherConfig
from shared.config.paths import without_job_folder
from shared.config.run import Config
from shared.errors import ConfigError
from shared.prompts.prompts import FORMAT
from shared.run.run_dir import write_atomically
from teacher_service.engine.description import TeacherDescription

PROMPT_WIDTH = 44  # characters of a prompt in the table


def optimise(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    address: str | None = None,
) -> None:
    """`tutelage prompts optimise`: search for every domain's prompt and write prompts.json.

    Without `service`, every teacher is started for as long as it is asked. Raises UserErrors
    before anything starts.
    """
    from cluster.planning.loading import load
    from cluster.session.placement import refuse_unplaceable_here, teachers_demands
    from cluster.session.services import reached, services_of
    from cluster.session.session import connected

    found = load(path, overrides)
    found = found.model_copy(update={"prompts": None})
    refuse_entities(found, "a search for prompts", "write task.template yourself")
    refuse_classifier(found, "a search for prompts", "write task.template yourself")
    refuse_images(found, "a search for prompts", "leave prompts out")
    refuse_across(found)
    refuse_unknown_instructions(found)
    refuse_prompts_by_row(found)
    to, services = target_of(found), services_of(found, service)
    with reached(address, services):
        for key in found.teachers if services is None else ():
            teachers = found.taught_by(key).teachers  # one after the other
            refuse_unplaceable_here(partial(teachers_demands, teachers))
        tasks = _tasks(found)
        with connected(address):
            outcomes = _searched(found, tasks, services, to)
    print(table(outcomes))
    print(f"\nPrompts   {to}")
    print(f"Train     tutelage run {path} prompts={to}")


def refuse_across(config: Config) -> None:
    """Refuse a teacher of another tokenizer, who would be asked in the student's tokens. Raises
    ConfigError."""
    if config.cross_tokenizer is not None:
        raise ConfigError(
            f"cross_tokenizer is {config.cross_tokenizer}, with which a teacher is shown no "
            "prompts; leave it out to search for some"
        )


def _tasks(config: Config) -> dict[str, Task]:
    """What is searched with, by domain. Raises UserErrors."""
    from cluster.planning.preparation import check

    hands, settings = check(config), config.prompt_search
    tasks = {name: task_of(name, config, hands.load_tokenizer()) for name in config.domains}
    for name, task in tasks.items():
        refuse_unfit(
            task,
            settings.instructions.get(name),
            max_new_tokens=settings.max_new_tokens,
            limit=hands.teachers[config.teacher_of(name)].context,
        )
    return tasks


def _searched(
    config: Config, tasks: Mapping[str, Task], services: Mapping[str, str] | None, to: Path
) -> dict[str, tuple[Task, Outcome]]:
    """Every domain's search, teacher by teacher; what is found is written each time."""
    outcomes: dict[str, tuple[Task, Outcome]] = {}
    fingerprints: dict[str, dict[str, str]] = {}
    for key in config.teachers:
        part = config.taught_by(key)
        led = [domain for domain in part.domains if config.teacher_of(domain) == key]
        if not led:
            continue
        with _serving(part, services[key] if services else None) as (name, description):
            fingerprints[key] = description.fingerprint
            teacher = _asked(config, name, description, own=services is None)
            for domain in led:
                task = tasks[domain]
                outcomes[domain] = (task, optimise_domain(task, config, teacher))
                write_atomically(to, json.dumps(written(outcomes, fingerprints), indent=1))
    return {name: outcomes[name] for name in config.domains}


def optimise_domain(task: Task, config: Config, teacher: Teacher) -> Outcome:
    """One domain's search, with a bar per round on the terminal, a line elsewhere."""
    settings = config.prompt_search
    bar = tqdm(unit="prompt", disable=not sys.stderr.isatty())

    def report(number: int, count: int) -> None:
        bar.set_description(f"{task.domain}, round {number}")
        bar.reset(total=count)
        if bar.disable:
            print(f"{task.domain}, round {number}: {count} prompts", flush=True)

    scorers = [
        scorer_for(
            task,
            split,
            teacher,
            cache=Path(config.paths.cache),
            max_new_tokens=settings.max_new_tokens,
            done=bar.update,
        )
        for split in (task.dev, task.confirm)
    ]
    with bar:
        return search(
            Material(settings.instructions.get(task.domain), task.pool, task.questions),
            settings,
            score=scorers[0],
            confirm=scorers[1],
            paraphrase=partial(rewrite, task, teacher),
            seed=config.seed,
            report=report,
        )


def refuse_prompts_by_row(config: Config) -> None:
    """Refuse a domain whose rows have prompts of their own, so that no run takes what is found.
    Raises ConfigError."""
    for name, domain in config.domains.items():
        if "teacher_prompt" in domain.columns:
            raise ConfigError(
                f"domains.{name}.columns has a teacher_prompt for each row, which the search shows "
                "with none, so that it would find a prompt for another task; leave the column out "
                "while searching, or search without the domain"
            )


def refuse_unknown_instructions(config: Config) -> None:
    """Refuse an instruction for a domain that is not there. Raises ConfigError."""
    for name in config.prompt_search.instructions:
        if name not in config.domains:
            raise ConfigError(
                f"prompt_search.instructions has one for {name}, which is none of the domains "
                f"{', '.join(config.domains)}; name the domain as there"
            )


def target_of(config: Config) -> Path:
    """The file the prompts go to, its folder made. Raises ConfigError where it cannot be one."""
    to = Path(config.prompt_search.to)
    if to.is_dir():
        raise ConfigError(f"prompt_search.to is {to}, a folder; name a file in it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"prompt_search.to is {to}, whose folder cannot be made: {error.strerror}; name another"
        ) from None
    return to


def written(
    outcomes: dict[str, tuple[Task, Outcome]], fingerprints: Mapping[str, dict[str, str]]
) -> dict[str, Any]:
    """The content of prompts.json: what training reads, and the search for people. `fingerprints`
    are those of the teachers asked so far, by name."""
    domains = {name: _entry(*found) for name, found in outcomes.items()}
    asked = {"teachers": dict(fingerprints)}
    if len(fingerprints) == 1:
        asked = {"teacher": next(iter(fingerprints.values()))}
    return {"format": FORMAT, "domains": domains, **asked}


def table(outcomes: dict[str, tuple[Task, Outcome]]) -> str:
    """A line per domain."""
    head = f"{'domain':<14}{'metric':<12}{'tried':>6}   {'dev':<18}{'without':<18}{'with':<18}"
    lines = [
        "Development set, then the untouched split without and with the prompt; mean (error).",
        f"{head}{'kept':<6}best prompt found",
    ]
    for name, (task, outcome) in outcomes.items():
        dev = outcome.winner.estimate
        cells = [
            "-" if e is None else f"{e.mean:.3f} ({e.se:.3f})"
            for e in (dev, outcome.without, outcome.confirmed)
        ]
        kept = "yes" if outcome.kept else "no"
        lines.append(
            f"{name:<14}{task.metric:<12}{len(outcome.history):>6}   "
            + "".join(f"{cell:<18}" for cell in cells)
            + f"{kept:<6}{_shortened(outcome)}"
        )
    return "\n".join(lines)


def _shortened(outcome: Outcome) -> str:
    prompt = outcome.winner.candidate.prompt
    if not prompt:
        return "none is better than the empty one"
    text, count = prompt.instruction, len(prompt.examples)
    short = text if len(text) <= PROMPT_WIDTH else f"{text[: PROMPT_WIDTH - 3]}..."
    return " + ".join(filter(None, [short and repr(short), f"{count} examples" if count else ""]))


def _entry(task: Task, outcome: Outcome) -> dict[str, Any]:
    def told(estimate: Any) -> dict[str, float]:
        return {"mean": estimate.mean, "se": estimate.se}

    return outcome.prompt.entry() | {
        "metric": task.metric,
        "kept": outcome.kept,
        "winner": outcome.winner.line(),
        "stopped": outcome.stopped,
        "dev_documents": len(task.dev.documents),
        "confirm_documents": len(task.confirm.documents),
        "confirmed": told(outcome.confirmed),
        "without_prompt": told(outcome.without),
        "gain": told(outcome.gain),
        "history": [trial.line() for trial in outcome.history],
    }


def _asked(config: Config, service: str, description: TeacherDescription, *, own: bool) -> Teacher:
    from cluster.launch.teachers.serving import pool_settings
    from teacher_service.service.pool import GenerationPool, TeacherPool

    client, found = config.prompt_search.to, description.fingerprint
    settings = pool_settings(config, service, teacher=found, client=client, own=own)
    return Teacher(description, TeacherPool(0, **settings), GenerationPool(0, **settings))


@contextmanager
def _serving(part: Config, service: str | None) -> Iterator[tuple[str, TeacherDescription]]:
    """A running service of a part's teacher, or one for the length of a `with`."""
    from cluster.launch.teachers.serving import refuse_other_teacher
    from teacher_service.service import service as services

    ((key, teacher),) = part.teachers.items()
    if service is None:
        yield from _own_service(part, f"{part.name}-prompts-{key}", teacher)
        return
    refuse_other_teacher(service, teacher)
    yield service, services.running(service).described()


def _own_service(
    found: Config, name: str, teacher: TeacherConfig
) -> Iterator[tuple[str, TeacherDescription]]:
    from cluster.session.placement import declared, refuse_unplaceable, teachers_demands
    from teacher_service.service import service as services

    refuse_unplaceable(teachers_demands(found.teachers, declared()))
    print(f"loading the teacher, {without_job_folder(teacher.model)}", flush=True)
    try:
        yield (
            name,
            services.start(name, teacher, detached=False, cache=found.paths.cache).described(),
        )
    finally:
        services.stop(name)
