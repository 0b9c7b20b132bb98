"""Absolute paths for everything a config names; what does not exist is refused here."""

import os
from pathlib import Path

from shared.config.run import Config, HubDataset, Source
from shared.errors import ConfigError, reason_of
from shared.locations import refuse_credentials

BUILTIN = "builtin:"
JOB_FOLDERS = "/runtime_resources/working_dir_files/"  # Ray removes them after the job


def resolve(config: Config, *, base: Path | None = None) -> Config:
    """The config with absolute paths: `paths` relative to `base` (the current folder), the rest
    relative to `paths.root`. In a Ray job, whose folder is temporary, `paths.runs` and
    `paths.cache` are relative to the home folder. Raises ConfigError for what does not exist."""
    base = (base or Path.cwd()).absolute()
    root = _absolute(config.paths.root, base)
    if not root.is_dir():
        raise ConfigError(f"paths.root is {str(root)!r}, which is no folder; set paths.root=FOLDER")
    paths = {
        "root": str(root),
        "runs": str(_absolute(config.paths.runs, _lasting(base))),
        "cache": str(_absolute(config.paths.cache, _lasting(base))),
    }
    store, prompts = config.targets.store, config.prompts
    return config.model_copy(
        update={
            "paths": config.paths.model_copy(update=paths),
            "teachers": {
                name: teacher.model_copy(
                    update={
                        "model": _model(teacher.model, root, f"teachers.{name}.model"),
                        "adapter": teacher.adapter
                        and _model(teacher.adapter, root, f"teachers.{name}.adapter"),
                    }
                )
                for name, teacher in config.teachers.items()
            },
            "student": config.student.model_copy(
                update={"model": _model(config.student.model, root, "student.model")}
            ),
            "domains": {
                name: domain.model_copy(
                    update={
                        part: _sources(getattr(domain, part), root, f"domains.{name}.{part}")
                        for part in ("train", "validation")
                    }
                )
                for name, domain in config.domains.items()
            },
            "prompts": prompts and str(_absolute(prompts, root)),
            "prompt_search": config.prompt_search.model_copy(
                update={"to": str(_absolute(config.prompt_search.to, root))}
            ),
            "targets": config.targets.model_copy(update={"store": store and _store(store, root)}),
        }
    )


def refuse_unwritable(option: str, folder: str) -> None:
    """Refuse a folder that cannot be made or written to, making none. Raises ConfigError."""
    place = Path(folder).expanduser()
    try:
        nearest = next(path for path in (place, *place.parents) if path.exists())
        reason = "" if nearest.is_dir() else f"{nearest} is no folder"
        if not reason and not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"{nearest} may not be written to"
    except OSError as error:
        reason = reason_of(error)
    if reason:
        raise ConfigError(f"{option} is {folder}, but {reason}; set {option}=FOLDER")


def _lasting(folder: Path) -> Path:
    """The home folder in place of the copy of a working folder that Ray makes for a job."""
    return Path.home() if JOB_FOLDERS in str(folder) else folder


def _absolute(path: str, base: Path) -> Path:
    return (base / Path(path).expanduser()).resolve()


def _store(store: str, root: Path) -> str:
    """A folder under root, or the address of one on another file system."""
    if "://" not in store:
        return str(_absolute(store, root))
    refuse_credentials(store)
    return store


def _model(model: str, root: Path, option: str) -> str:
    """A folder that exists under root, or a name on the hub."""
    if model.startswith(BUILTIN):
        return model
    folder = _absolute(model, root)
    if folder.is_dir():
        return str(folder)
    meant_locally = model.startswith((".", "/", "~")) or model.count("/") > 1
    if meant_locally or ("/" in model and folder.parent.is_dir()):
        raise ConfigError(
            f"{option} is {model!r}, but {folder} is no folder; set {option} or paths.root"
        )
    return model


def _sources(
    sources: Source | list[Source] | None, root: Path, option: str
) -> Source | list[Source] | None:
    if isinstance(sources, list):
        return [_source(s, root, f"{option}.{i}") for i, s in enumerate(sources)]
    return sources and _source(sources, root, option)


def _source(source: Source, root: Path, option: str) -> Source:
    if isinstance(source, HubDataset):
        local = _absolute(source.dataset, root)
        return source.model_copy(update={"dataset": str(local)}) if local.exists() else source
    if source.startswith(BUILTIN):
        return source
    from shared.text.files import below  # Arrow is slow to import, and most sources are files

    path = _absolute(source, root)
    if not path.exists() and not below(path):
        raise ConfigError(
            f"{option} is {source!r}, but {path} does not exist; set {option} or paths.root"
        )
    return str(path)
