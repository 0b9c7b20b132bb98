"""Models that are made of others before a run: a teacher's PEFT adapter goes on its base, a
student's is merged into it, and a dense student that is to be a mixture of experts becomes one."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import xxhash

from cluster.builtin.models import renamed_into_place
from cluster.planning.description import READERS, files_of
from cluster.planning.folders import refuse_incomplete_adapter
from shared.config.models.student import Student, Upcycle
from shared.config.models.teachers import Teacher
from shared.config.paths import BUILTIN, located
from shared.config.run import Config
from shared.errors import ConfigError
from shared.images.processor import image_processor
from shared.loading import (
    MERGED,
    UPCYCLED,
    first_line,
    keep_upcycling,
    stored_as,
    upcycled_of,
)
from shared.locking import alone

ADAPTER_CONFIG = "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter that an option names as a model."""

    option: str
    name: str  # a folder, or a name on the hub
    base: str  # likewise
    base_revision: str | None


def teachers_on_bases(config: Config) -> Config:
    """The config with every teacher whose model is an adapter as that adapter on its base, which is
    said. Raises ConfigError for an adapter whose base is not known or not there."""
    teachers = {name: _on_base(name, t, config) for name, t in config.teachers.items()}
    return config.model_copy(update={"teachers": teachers})


def student_merged(config: Config) -> Config:
    """The config with a student whose model is an adapter as the folder of the merged weights,
    which are made where the cache lacks them. Raises ConfigError as `teachers_on_bases` does."""
    asked, root = config.student, Path(config.paths.root)
    found = find_adapter("student.model", asked.model, revision=asked.revision, root=root)
    if found is None:
        return config
    folder = str(_merged(found, asked, cache=Path(config.paths.cache).expanduser()))
    print(
        f"{found.option} is {found.name}, a PEFT adapter on {found.base}: their merged weights, in "
        f"{folder}, are the student",
        flush=True,
    )
    return with_student(config, folder)


def with_student(config: Config, model: str, revision: str | None = None) -> Config:
    """The config with another model as the student, and as a teacher that follows it."""
    update = {"model": model, "revision": revision}
    teachers = {
        name: teacher.model_copy(update=update) if teacher.follow_student else teacher
        for name, teacher in config.teachers.items()
    }
    student = config.student.model_copy(update=update)
    return config.model_copy(update={"student": student, "teachers": teachers})


def student_upcycled(config: Config) -> Config:
    """The config with a dense student that is to be upcycled, and a teacher that follows it, as the
    folder of the mixture, which is made where the cache lacks it. Raises ConfigError for a model
    that no mixture holds."""
    asked = config.student
    if asked.upcycle is None or _is_upcycled(asked, asked.upcycle):
        return config
    folder = str(_upcycled(asked, asked.upcycle, config))
    print(
        f"student.model is {asked.model}, upcycled to {asked.upcycle.in_words()}: in {folder}",
        flush=True,
    )
    return with_student(config, folder)


def refuse_dense(config: Config, upcycle: Upcycle | None) -> None:
    """Raise ConfigError for a dense student that no mixture holds as `upcycle` asks for it."""
    asked = config.student
    if upcycle is not None and not _is_upcycled(asked, upcycle):
        _mixture_of(config, upcycle)


def refuse_unreachable(option: str, model: str, revision: str | None) -> None:
    """Refuse a name of the hub of which this machine has no file where no hub answers: asking for
    each file anew takes a minute. Raises ConfigError."""
    if model.startswith(BUILTIN) or Path(model).is_dir():
        return
    import huggingface_hub
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return
    known = {"repo_id": model, "revision": revision, "cache_dir": constants.HF_HUB_CACHE}
    try:
        names = ("config.json", ADAPTER_CONFIG)
        if any(
            isinstance(huggingface_hub.try_to_load_from_cache(filename=n, **known), str)
            for n in names
        ):
            return
        url = huggingface_hub.hf_hub_url(
            model, names[0], revision=revision, endpoint=constants.ENDPOINT
        )
        huggingface_hub.get_hf_file_metadata(url)
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # the hub's own answers are told later
            return
        raise ConfigError(
            f"{option} is {model!r}, which is no folder under paths.root, and no hub answers that "
            f"might have it ({first_line(error)}); check the network, or name a folder"
        ) from None


def find_adapter(option: str, model: str, *, revision: str | None, root: Path) -> Adapter | None:
    """The adapter that an option names as a model, None where it names a whole one. Raises
    ConfigError where both lie in one place, or the base is not known or not there."""
    refuse_unreachable(option, model, revision)
    path = _adapter_config(model, revision)
    if path is None:
        return None
    if _is_whole(model, path.parent, revision):
        raise ConfigError(
            f"{option} is {model}, which holds a whole model and a PEFT adapter beside it; save "
            f"the one that is meant to a folder of its own and set {option} to it"
        )
    where = f"base_model_name_or_path in {path}"
    refuse_incomplete_adapter(option, model)
    try:
        settings = json.loads(path.read_text())
        base, base_revision = settings["base_model_name_or_path"], settings.get("revision")
    except ValueError as error:
        raise ConfigError(
            f"{option} is {model}, a PEFT adapter whose {ADAPTER_CONFIG} is not valid JSON "
            f"({first_line(error)}); get it again"
        ) from None
    except (OSError, KeyError, TypeError):  # no object in it
        base = base_revision = None
    if not base or not isinstance(base, str):
        raise ConfigError(
            f"{option} is {model}, a PEFT adapter that does not name its base; set {where}"
        )
    base = located(base, root, where)
    if _adapter_config(base, base_revision) is not None:
        raise ConfigError(
            f"{option} is {model}, a PEFT adapter on {base}, which is or holds an adapter itself; "
            f"merge that one into its base first and set {where}"
        )
    return Adapter(option, model, base, None if Path(base).is_dir() else base_revision)


def _on_base(name: str, teacher: Teacher, config: Config) -> Teacher:
    option, root = f"teachers.{name}.model", Path(config.paths.root)
    found = find_adapter(option, teacher.model, revision=teacher.revision, root=root)
    if found is None:
        return teacher
    if teacher.adapter is not None:
        raise ConfigError(
            f"{option} is {found.name}, a PEFT adapter, and teachers.{name}.adapter is "
            f"{teacher.adapter}; set {option} to a whole model, as {found.base}, which is its base"
        )
    if teacher.follow_student is not None:
        raise ConfigError(
            f"{option} is {found.name}, a PEFT adapter, and follow_student is set, with which it "
            "is laid out as the student that trains; merge the adapter into its base and set "
            f"student.model and {option} to that"
        )
    print(
        f"{option} is {found.name}, a PEFT adapter: it goes on {found.base}, its base", flush=True
    )
    return teacher.model_copy(
        update={
            "model": found.base,
            "revision": found.base_revision,
            "adapter": found.name,
            "adapter_revision": teacher.revision,
        }
    )


def _adapter_config(model: str, revision: str | None) -> Path | None:
    """Where an adapter's config lies on this machine; None for a model without one."""
    if model.startswith(BUILTIN):
        return None
    if Path(model).is_dir():
        path = Path(model) / ADAPTER_CONFIG
        return path if path.exists() else None
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(model, revision=revision)
    except OSError:  # no model of the hub, as whoever describes it says
        return None
    return None if found is None else Path(found)


def _is_whole(model: str, folder: Path, revision: str | None) -> bool:
    """Whether a model's own weights lie beside the adapter's."""
    if Path(model).is_dir():
        names = (path.name for path in folder.glob("*.safetensors"))
        return any(not name.startswith("adapter_") for name in names)
    from transformers.utils.hub import has_file

    return any(has_file(model, name, revision=revision) for name in WHOLE)


def _merged(found: Adapter, asked: Student, *, cache: Path) -> Path:
    """The folder of the merged weights, in the dtype that trains."""
    from teacher_service.engine.loading import local_folder

    base = local_folder(found.base, revision=found.base_revision, marker="config.json")
    adapter = local_folder(found.name, revision=asked.revision, marker=ADAPTER_CONFIG)
    _refuse_few_bits(found, base / "config.json")
    versions = [version(name) for name in READERS]
    decisive = [MERGED, asked.dtype, versions, *((str(f), files_of(f)) for f in (base, adapter))]
    key = xxhash.xxh3_64_hexdigest(json.dumps(decisive, sort_keys=True).encode())
    target = cache / "merged" / f"{Path(found.name).name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.with_name(f"{target.name}.lock"), making="the merged student"):
        if not target.is_dir():
            with renamed_into_place(target) as scratch:
                _merge_into(scratch, found, asked)
    return target


def _is_upcycled(student: Student, asked: Upcycle) -> bool:
    """Whether the student is a mixture that was made as asked. Raises ConfigError where it was made
    otherwise."""
    found = upcycled_of(Path(student.model))
    if found is not None and found["asked"] != asked.shape:
        raise ConfigError(
            f"student.upcycle asks for {asked.in_words()}, but student.model {student.model} was "
            f"upcycled otherwise, from {found['model']}; set student.model={found['model']}"
        )
    return found is not None


def _upcycled(asked: Student, upcycle: Upcycle, config: Config) -> Path:
    """The folder of the mixture, in the dtype that trains."""
    from teacher_service.engine.loading import local_folder

    refuse_unreachable("student.model", asked.model, asked.revision)
    dense = local_folder(asked.model, revision=asked.revision, marker="config.json")
    versions = [version(name) for name in READERS]
    decisive = [UPCYCLED, asked.dtype, upcycle.shape, config.seed, versions, files_of(dense)]
    key = xxhash.xxh3_64_hexdigest(json.dumps(decisive, sort_keys=True).encode())
    name = Path(asked.model).name
    target = Path(config.paths.cache).expanduser() / "upcycled" / f"{name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.with_name(f"{target.name}.lock"), making="the mixture of the student"):
        if not target.is_dir():
            with renamed_into_place(target) as scratch:
                _upcycle_into(scratch, config, upcycle)
    return target


def _upcycle_into(folder: Path, config: Config, upcycle: Upcycle) -> None:
    """Save the mixture with the dense model's tokenizer, and its processor where it sees."""
    from transformers import AutoTokenizer

    asked = config.student
    _mixture_of(config, upcycle).save_pretrained(folder)
    trusted = asked.trust_remote_code
    if config.task.sees:
        image_processor(asked.model, asked.revision, trusted=trusted).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        asked.model, revision=asked.revision or "main", trust_remote_code=trusted
    )
    tokenizer.save_pretrained(folder)
    made_from = {"model": asked.model, "revision": asked.revision, "asked": upcycle.shape}
    (folder / UPCYCLED).write_text(json.dumps(made_from))


def _mixture_of(config: Config, upcycle: Upcycle) -> Any:
    """The mixture that a dense student becomes."""
    from student_trainer import accelerator  # noqa: F401  # before what it keeps quiet
    from student_trainer.models.student import load_model
    from student_trainer.models.upcycling import upcycled
    from student_trainer.tasks.registry import task_of

    plain = config.student.model_copy(update={"train": {"kind": "full"}})
    dense = load_model(plain, task_of(config).model)
    return upcycled(dense, upcycle, name=config.student.model, seed=config.seed)


def _refuse_few_bits(found: Adapter, config: Path) -> None:
    stored = stored_as(SimpleNamespace(**json.loads(config.read_text())))
    if stored is not None:
        raise ConfigError(
            f"{found.option} is {found.name}, a PEFT adapter on {found.base}, which is stored "
            f"{stored}, and such weights do not train; set base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} to the unquantised base"
        )


def _merge_into(folder: Path, found: Adapter, asked: Student) -> None:
    """Save base plus adapter as one model, with the adapter's tokenizer where it has one."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    from student_trainer import accelerator  # noqa: F401  # before what it keeps quiet
    from student_trainer.models.student import load_model
    from student_trainer.tasks.causal_lm import CAUSAL_LM
    from teacher_service.engine.loading import with_adapter

    plain = {"model": found.base, "revision": found.base_revision, "train": {"kind": "full"}}
    base = load_model(asked.model_copy(update=plain), CAUSAL_LM.model)
    model: Any = with_adapter(base, found.name, asked.revision)
    try:
        model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    except ValueError as error:  # numbers that are not finite
        raise ConfigError(
            f"{found.option} is {found.name}, a PEFT adapter that cannot be merged: "
            f"{first_line(error)}; get it again"
        ) from None
    optional = {"_raise_exceptions_for_missing_entries": False}
    own = cached_file(found.name, "tokenizer_config.json", revision=asked.revision, **optional)
    source = (found.base, found.base_revision) if own is None else (found.name, asked.revision)
    tokenizer = AutoTokenizer.from_pretrained(
        source[0], revision=source[1] or "main", trust_remote_code=asked.trust_remote_code
    )
    tokenizer.save_pretrained(folder)
    keep_upcycling(folder, Path(found.base))
    (folder / MERGED).write_text(json.dumps({"adapter": found.name, "base": found.base}))
