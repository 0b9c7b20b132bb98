"""`tutelage active`: rounds in which the teacher writes what the student is trained on."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cluster.active.folder import ActiveDir, read_json, write_json
from cluster.active.material import Material, material_of
from cluster.active.report import report_of, table, write_report
from cluster.active.standing import Standing
from shared.config.adaptive_losses import learns_pairs
from shared.config.file import dump, load_config
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.changes import changed_options, differing_options, in_words
from shared.run.run_dir import RunDir, locked, move_aside, write_atomically

DECIDES = ("active.method", "active.domain")  # beside what decides of any run


def active(
    path: Path,
    overrides: Sequence[str],
    *,
    service: str | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> ActiveDir:
    """`tutelage active`; returns the folder. Raises UserErrors before anything starts, and one
    where a round gives nothing to learn, after what there is was reported and exported."""
    from cluster.planning.loading import load
    from cluster.session.services import reached, services_of

    config = load(path, overrides)
    refuse_unfit(config)
    services = services_of(config, service)
    folder = ActiveDir(Path(config.paths.runs) / config.name)
    with locked(RunDir(folder.path)), reached(address, services):
        if fresh:
            move_aside(RunDir(folder.path))
        _open(folder, config)
        material = _material(config)
        refuse_other_text(folder, material)
        standing = _taught(material, folder, services, address)
        report = report_of(folder, standing, domain=material.domain, settings=material.settings)
        write_report(folder, report)
        print(f"\n{table(report)}\n")
        print(f"Report    {folder.report}\nNumbers   {folder.rounds}\nStudent   {folder.export}")
    if standing.refused:
        raise ConfigError(standing.stopped)
    return folder


def refuse_unfit(config: Config) -> None:
    """Refuse a config without rounds, or whose teacher cannot write. Raises ConfigError."""
    if config.active is None:
        raise ConfigError(
            "the config has no section `active`, which says how the teacher writes in rounds; add "
            "active: {method: pgkd}, or take `tutelage run`"
        )
    if config.targets.teacher_free:
        raise ConfigError(
            "targets.teacher_free leaves no teacher that could write; remove it, or take `tutelage "
            "run`"
        )
    if config.task.classifies:
        raise ConfigError(
            f"task is {config.task.kind}, but rounds are of a student that writes its answers; "
            "leave task out, with classes as responses, or take `tutelage run`"
        )
    if config.cross_tokenizer is not None:
        raise ConfigError(
            f"cross_tokenizer is {config.cross_tokenizer}, and what a teacher writes in rounds is "
            "in the student's tokens; leave it out, or take `tutelage run`"
        )
    if learns_pairs(config.losses):
        raise ConfigError(
            "losses has a preference, of rows with a chosen and a rejected response, and a teacher "
            "writes one in rounds; take a divergence, or `tutelage run`"
        )
    for name, teacher in config.teachers.items():
        if teacher.online_modules is not None or teacher.follow_student is not None:
            option = "online_modules" if teacher.online_modules is not None else "follow_student"
            raise ConfigError(
                f"teachers.{name}.{option} makes the teacher another one in every step, and rounds "
                "share a teacher; remove it, or take `tutelage run`"
            )


def refuse_other_text(folder: ActiveDir, material: Material) -> None:
    """Record what the text is known by; raise ConfigError where rounds were made of another."""
    if not folder.text.exists():
        write_json(folder.text, material.digests)
    for part, digest in read_json(folder.text).items():
        if digest != material.digests[part]:
            raise ConfigError(
                f"domains.{material.domain}.{part} has other rows than when the rounds began; put "
                "the text back, give them another name, or pass --fresh to move the old ones aside"
            )


def _open(folder: ActiveDir, config: Config) -> None:
    """Record the config. Raises ConfigError where the folder is another's."""
    if RunDir(folder.path).config.exists():
        raise ConfigError(
            f"{folder.path} is a run of its own; give the rounds another name, or pass --fresh to "
            "move it aside"
        )
    if folder.config.exists():
        before = load_config(folder.config)
        changed = changed_options(before, config)
        found = differing_options(before, config)
        found |= {name: changed[name] for name in DECIDES if name in changed}
        if found:
            listed = ", ".join(in_words(name, *values) for name, values in found.items())
            raise ConfigError(
                f"the rounds {config.name!r} were started with other values of {listed}; change "
                "them back, give them another name, or pass --fresh to move the old ones aside"
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, dump(config))


def _material(config: Config) -> Material:
    """The text of the rounds, and that there is some to answer."""
    from cluster.planning.preparation import check

    material = material_of(config, check(config).load_tokenizer())
    material.train_items(0)
    material.validation_items()
    return material


def _taught(
    material: Material,
    folder: ActiveDir,
    services: Mapping[str, str] | None,
    address: str | None,
) -> Standing:
    from cluster.active.loop import Parts, teach
    from cluster.active.serving import ServiceWriter, answers_of, teachers_up
    from cluster.session.session import connected

    config, key = material.config, material.config.teacher_of(material.domain)
    with connected(address), teachers_up(config, folder.path, services) as serving:
        teacher, own = config.teachers[key], services is None
        writer = ServiceWriter(config, teacher, folder.path, serving[key], own=own)
        names = ",".join(f"{teacher}={name}" for teacher, (name, _) in serving.items())
        parts = Parts(
            train=partial(_train, services=names),
            answer=partial(answers_of, domain=material.domain, settings=material.settings),
            writer=writer,
            say=partial(print, flush=True),
        )
        return teach(material, folder, parts)


def _train(config: Config, *, services: str) -> None:
    """One round's run, on the teachers that serve already."""
    from cluster.launch import driver
    from cluster.planning.bases import student_merged

    driver.train(student_merged(config), service=services)
