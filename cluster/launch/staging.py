"""A run in stages: runs one after the other, each from the student that the one before exported.

    runs/NAME/stages/NAME-STAGE/   the run of every stage but the last
    runs/NAME/                     that of the last, and so what other commands find

A stage is an ordinary run, with checkpoints, report and export of its own, that resumes by itself,
so which one is under way is what their folders say. A stage begins with new moments of AdamW.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.builtin.models import resolve_builtin, stages_to_build
from cluster.launch.continuing import has_ended
from cluster.planning.bases import refuse_dense, with_student
from cluster.planning.loading import made
from cluster.report.stages import expect, stages_of_run
from cluster.session.services import named_services, reached, services_of
from cluster.session.session import connected
from shared.config.file import in_stages, resolve
from shared.config.losses import RouterBalance
from shared.config.run import Config
from shared.errors import ConfigError, UserError
from shared.run.run_dir import RunDir, locked, move_aside, write_atomically

NAMES = "names.json"  # of the stages, in order, among their folders


@dataclass(frozen=True, slots=True)
class Stage:
    """One of them."""

    name: str
    config: Config  # of its run, whose student may not be there yet

    @property
    def run_dir(self) -> RunDir:
        """Where it runs."""
        return RunDir(Path(self.config.paths.runs) / self.config.name)


def stages_of(config: Config) -> list[Stage]:
    """The stages of a resolved config, in order."""
    whole, found = RunDir(Path(config.paths.runs) / config.name), list[Stage]()
    staged = in_stages(config)
    for number, (name, asked) in enumerate(staged.items(), start=1):
        own = resolve(asked)
        update: dict[str, object] = {}
        if number < len(staged):
            paths = own.paths.model_copy(update={"runs": str(whole.stages)})
            update = {"name": f"{config.name}-{name}", "paths": paths}
        if found:
            own = with_student(own, str(found[-1].run_dir.export))
        found.append(Stage(name, own.model_copy(update=update)))
    return found


def run(config: Config, *, fresh: bool = False, address: str | None = None) -> RunDir:
    """`tutelage run` of a config with stages; returns the folder. Raises what `driver.run` does,
    and a UserError for any of the stages before the first one starts."""
    from cluster.launch import driver

    def go(stage: Config) -> None:
        driver.run(stage, address=address)

    return _in_turn(config, go, fresh=fresh, address=address, services=None)


def train(
    config: Config, *, service: str | None = None, fresh: bool = False, address: str | None = None
) -> RunDir:
    """The same of `tutelage train`: one service teaches in all stages."""
    from cluster.launch import driver

    services = services_of(config, service) or named_services(config)

    def go(stage: Config) -> None:
        driver.train(stage, service=service, address=address)

    return _in_turn(config, go, fresh=fresh, address=address, services=services)


def refuse_staged(config: Config) -> None:
    """Raise ConfigError where a config without stages names the folder of a run that has some."""
    run_dir = RunDir(Path(config.paths.runs) / config.name)
    if run_dir.stages.exists():
        raise ConfigError(
            f"{run_dir.path} holds a run in stages, which this config has not; give this run "
            "another name, or pass --fresh to move that one aside"
        )


def _in_turn(
    config: Config,
    go: Callable[[Config], None],
    *,
    fresh: bool,
    address: str | None,
    services: Mapping[str, str] | None,
) -> RunDir:
    stages, whole = stages_of(config), RunDir(Path(config.paths.runs) / config.name)
    with reached(address, services):
        if fresh or not stages[0].run_dir.has_begun:
            _refuse_other_classes(stages)
            for stage in stages[1:]:
                _refuse_impossible(stage, config)
        with locked(whole):
            if fresh:
                move_aside(whole)
            _refuse_other_stages(whole, stages)
        with locked(RunDir(whole.stages)):
            _go(whole, stages, go, address)
    print("\n".join(f"Stage     {stage.run_dir.report}, {stage.name}" for stage in stages[:-1]))
    return whole


def _go(
    whole: RunDir, stages: Sequence[Stage], go: Callable[[Config], None], address: str | None
) -> None:
    """Run the stages one after the other, those that have ended among them."""
    whole.stages.mkdir(parents=True, exist_ok=True)
    write_atomically(whole.stages / NAMES, json.dumps([stage.name for stage in stages]))
    with connected(address):
        for number, stage in enumerate(stages):
            _refuse_grown(stage, stages[number + 1 :])
            print(f"\nstage {stage.name}, {number + 1} of {len(stages)}", flush=True)
            expect([*stages_to_build(stage.config), *stages_of_run(stage.config)])
            go(made(stage.config))


def _refuse_other_stages(whole: RunDir, stages: Sequence[Stage]) -> None:
    """Raise ConfigError where the folder is of a run that has begun with other stages, or none."""
    if whole.config.exists() and not whole.stages.exists():
        raise ConfigError(
            f"{whole.path} holds a run without stages; give this run another name, or pass "
            "--fresh to move that one aside"
        )
    path = whole.stages / NAMES
    before = json.loads(path.read_text()) if path.exists() else []
    now = [stage.name for stage in stages]
    folders = [whole, *(RunDir(whole.stages / f"{whole.path.name}-{name}") for name in before)]
    if before and before != now and any(folder.has_begun for folder in folders):
        raise ConfigError(
            f"{whole.path} was begun with the stages {', '.join(before)}, now they are "
            f"{', '.join(now)}; change them back, give this run another name, or pass --fresh to "
            "move that one aside"
        )


def _refuse_other_classes(stages: Sequence[Stage]) -> None:
    """Raise ConfigError where a later stage's rows have other classes than the first one's, whose
    head its student has."""
    from cluster.planning.tasks.classes import with_classes

    found = [list(with_classes(resolve_builtin(one.config)).task.classes) for one in stages]
    for stage, classes in zip(stages, found, strict=True):
        if classes != found[0]:
            odd = min({*classes} ^ {*found[0]})
            raise ConfigError(
                f"stage {stage.name} has other classes than stage {stages[0].name}: its rows and "
                f"those do not both have {odd}; give all stages rows of the same classes"
            )


def _refuse_impossible(stage: Stage, whole: Config) -> None:
    """Prepare a later stage with the student that the first one begins with, as far as that can
    be: its rows are then in the cache. Raises UserErrors."""
    from cluster.planning.preparation import prepare_run, refuse_unasked, refuse_unreached

    own = with_student(stage.config, whole.student.model, whole.student.revision)
    plain = [loss for loss in own.losses if not isinstance(loss, RouterBalance)]
    dense = own.student.model_copy(update={"upcycle": None})
    try:
        config = made(own.model_copy(update={"student": dense, "losses": plain or own.losses}))
        refuse_dense(config, own.student.upcycle)
        refuse_unasked(config)
        refuse_unreached(config)
        prepare_run(config)
    except UserError as error:
        raise type(error)(f"stage {stage.name}: {error}") from error


def _refuse_grown(stage: Stage, later: Sequence[Stage]) -> None:
    """Raise ConfigError for more steps of a stage that another one has begun from."""
    begun = next((one for one in later if one.run_dir.has_begun), None)
    if begun is not None and not has_ended(stage.run_dir, stage.config):
        raise ConfigError(
            f"stage {stage.name} has not taken its {stage.config.steps} steps, and stage "
            f"{begun.name} began from what it had learnt before; set its steps to what they were, "
            "or pass --fresh to move the run aside"
        )
