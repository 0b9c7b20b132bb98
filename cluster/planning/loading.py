"""From a config file and overrides to a config that can run: resolved, every built-in made."""

import os
from collections.abc import Sequence
from pathlib import Path

from shared.config.file import load_config, resolve
from shared.config.idle import refuse_idle
from shared.config.paths import in_job, refuse_unwritable
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.run_dir import RunDir


def load(path: Path, overrides: Sequence[str]) -> Config:
    """A config file with overrides, every path absolute and every model made."""
    return made(read(path, overrides))


def made(config: Config) -> Config:
    """The config with every builtin, the student's merged weights and its experts made, where it
    needs some, and with the classes of its rows, where they have some. Raises ConfigError for one
    of several runs."""
    if config.stages:
        raise ConfigError(
            f"the config has the stages {', '.join(config.stages)}, which `tutelage run` and "
            "`tutelage train` go through, and this command looks at one run; set stages={} and the "
            "options of one stage"
        )
    from cluster.builtin.models import resolve_builtin
    from cluster.planning.bases import student_merged, student_upcycled
    from cluster.planning.tasks.classes import with_classes
    from cluster.planning.tasks.tiny import with_tiny

    named = with_tiny(with_classes(resolve_builtin(config)))
    return student_upcycled(student_merged(named))


def read(path: Path, overrides: Sequence[str]) -> Config:
    """A config file with overrides, every path absolute, teachers that are adapters on their
    bases; built-in names stay. Raises ConfigError for an option without effect."""
    from cluster.planning.bases import teachers_on_bases
    from cluster.session.session import prepare_environment

    prepare_environment()
    config = resolve(load_config(path, overrides))
    if not RunDir(Path(config.paths.runs) / config.name).config.exists():
        refuse_idle(config)  # a run that goes on keeps what it began with
    _leave_job_folder()
    refuse_unwritable("paths.cache", config.paths.cache)
    return teachers_on_bases(config)


def _leave_job_folder() -> None:
    """Work in the home folder from here on: Ray may remove a job's folder, or put another copy in
    its place, while the command is in it."""
    if in_job():
        os.chdir(Path.home())
