"""Absolute paths for everything a config names; what does not exist is refused here."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shared.config.domains import HubDataset, Source
from shared.config.run import Config
from shared.errors import ConfigError, reason_of
from shared.locations import refuse_credentials

BUILTIN = "builtin:"
PLACEHOLDER = "path/or/hub-name"  # of the recipe that `tutelage init` writes by default
JOB_FOLDERS = "/runtime_resources/working_dir_files/"  # Ray removes them after the job
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a job


def resolve(config: Config, *, base: Path | None = None) -> Config:
    """The config with absolute paths: `paths` relative to `base` (the current folder), the rest
    relative to `paths.root`. In a Ray job, whose folder is temporary, what is written is relative
    to the home folder: `paths.runs`, `paths.cache`, `prompt_search.to`, and `targets.store` unless
    the job took it along. Raises ConfigError for what does not exist."""
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
                        "model": located(teacher.model, root, f"teachers.{name}.model"),
                        "adapter": teacher.adapter
                        and located(teacher.adapter, root, f"teachers.{name}.adapter"),
                    }
                )
                for name, teacher in config.teachers.items()
            },
            "student": config.student.model_copy(
                update={"model": located(config.student.model, root, "student.model")}
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
                update={"to": str(_absolute(config.prompt_search.to, _lasting(root)))}
            ),
            "targets": config.targets.model_copy(update={"store": store and _store(store, root)}),
        }
    )


def local_paths(
    config: Config, *, base: Path | None = None
) -> Iterator[tuple[str, str, list[Path]]]:
    """Options that name relative paths of models, text and prompts: the option, the path as
    written, and the files that it names; no names of the hub, and nothing under an absolute
    `paths.root`. Raises ConfigError for what does not exist."""
    if _leads_away(config.paths.root):
        return
    root = (base or Path.cwd()).absolute() / config.paths.root
    for option, value in _read(config):
        written = value.dataset if isinstance(value, HubDataset) else value
        if written.startswith(BUILTIN) or _leads_away(written):
            continue
        if isinstance(value, str) and option.endswith((".model", ".adapter")):
            located(value, root, option)
        else:
            _source(value, root, option)
        yield option, written, _files(Path(os.path.normpath(root / written)))


def refuse_unwritable(option: str, folder: str) -> None:
    """Refuse a folder that cannot be made or written to, leaving none. Raises ConfigError."""
    place = Path(folder).expanduser()
    nearest, reason = place, ""
    try:
        nearest = next(path for path in (place, *place.parents) if path.exists())
        if nearest.is_dir():  # modes do not tell it to root, nor of a read-only file system
            TemporaryDirectory(dir=nearest).cleanup()
        else:
            reason = f"{nearest} is no folder"
    except OSError as error:
        reason = f"{nearest} cannot be written to: {reason_of(error)}"
    if reason:
        raise ConfigError(f"{option} is {folder}, but {reason}; set {option}=FOLDER")


def in_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return JOB_VARIABLE in os.environ


def without_job_folder(path: str) -> str:
    """A path in a job's copy of a working folder as the path in that folder; others as they are."""
    folder, found, inside = path.partition(JOB_FOLDERS)
    return inside.partition("/")[2] if found and folder else path


def recovered(config: Config, *, base: Path | None = None) -> Config:
    """The config of a job whose copy of a working folder Ray has removed, with what lay in it below
    `base`, by default the current folder, as where it was submitted from; others as they are."""
    root, base = config.paths.root, (base or Path.cwd()).absolute()
    if JOB_FOLDERS not in root or Path(root).is_dir():
        return config

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        if isinstance(value, list):
            return [moved(one) for one in value]
        in_job = isinstance(value, str) and JOB_FOLDERS in value
        return str(base / without_job_folder(value)) if in_job else value

    return Config.model_validate(moved(config.model_dump(mode="json")))


def _lasting(folder: Path) -> Path:
    """The home folder in place of the copy of a working folder that Ray makes for a job."""
    return Path.home() if JOB_FOLDERS in str(folder) else folder


def _absolute(path: str, base: Path) -> Path:
    return (base / Path(path).expanduser()).resolve()


def _leads_away(path: str) -> bool:
    """Whether a path does not depend on the current folder."""
    return Path(path).expanduser().is_absolute()


def _read(config: Config) -> Iterator[tuple[str, Source]]:
    """Options that name what is read, each with one path."""
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}.model", teacher.model
        if teacher.adapter:
            yield f"teachers.{name}.adapter", teacher.adapter
    yield "student.model", config.student.model
    for name, domain in config.domains.items():
        for part in ("train", "validation"):
            sources = getattr(domain, part) or []
            listed = sources if isinstance(sources, list) else [sources]
            yield from ((f"domains.{name}.{part}", source) for source in listed)
    if config.prompts:
        yield "prompts", config.prompts


def _files(path: Path) -> list[Path]:
    """A file, the visible files of a folder, or those that a glob matches; none of a name that is
    no path."""
    from shared.text.files import below

    if path.is_file():
        return [path]
    if not path.is_dir():
        return below(path)
    inside = (p for p in path.rglob("*") if p.is_file())
    return [p for p in inside if not _hidden(p.relative_to(path))]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _store(store: str, root: Path) -> str:
    """A folder under root, or the address of one on another file system."""
    if "://" not in store:
        inside = _absolute(store, root)
        return str(inside if inside.exists() else _absolute(store, _lasting(root)))
    refuse_credentials(store)
    return store


def located(model: str, root: Path, option: str) -> str:
    """A model as a folder that exists under root, or as a name on the hub. Raises ConfigError for
    what can only be a folder and is none."""
    if model.startswith(BUILTIN):
        return model
    if model == PLACEHOLDER:
        raise ConfigError(
            f"{option} is {model!r}, which stands in a first config for a model of yours; "
            f"set {option} to its folder or its name on the hub"
        )
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
    if sources == [] and option.endswith(".train"):
        raise ConfigError(f"{option} is an empty list; name a file, folder, glob or dataset")
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
