"""From a config file and overrides to a config that can run: resolved, every built-in made."""

from collections.abc import Sequence
from pathlib import Path

from shared.config.file import load_config, resolve
from shared.config.paths import refuse_unwritable
from shared.config.run import Config


def load(path: Path, overrides: Sequence[str]) -> Config:
    """A config file with overrides, every path absolute and every builtin made."""
    from cluster.builtin.models import resolve_builtin

    return resolve_builtin(read(path, overrides))


def read(path: Path, overrides: Sequence[str]) -> Config:
    """A config file with overrides, every path absolute; built-in names stay."""
    from cluster.session.session import prepare_environment

    prepare_environment()
    config = resolve(load_config(path, overrides))
    refuse_unwritable("paths.cache", config.paths.cache)
    return config
