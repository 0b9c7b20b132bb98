"""What a model's files say of it, read once: the second time nothing of transformers is imported.

Descriptions are kept in the cache under a hash of everything that decides them: the small files of
a local folder by content, its weights by size and time, and the versions of what reads them.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from shared.config.models.attention import offered_by
from shared.config.run import Config
from shared.data.passes import Passes
from shared.data.trust import Trust
from shared.errors import ConfigError, StorageError
from shared.loading import (
    OF_WORDS,
    classes_of,
    first_line,
    head_of,
    stored_as,
    untrusted,
)
from shared.model_parts import longest_context
from shared.run.run_dir import write_atomically
from shared.text.tokenizers import TokenizerIdentity, identify, rows_digest
from student_trainer.models.routers import OtherRouterLoss, router_balance_of
from student_trainer.tasks.registry import task_of

READERS = ("transformers", "tokenizers", "torch", "peft")
FORMAT = 8  # of what is kept


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model before its weights are read."""

    option: str  # that names it
    name: str
    identity: TokenizerIdentity
    rows_digest: str  # of the tokenizer, see `shared.text.tokenizers.rows_digest`
    vocab_size: int  # rows of its head
    hidden_size: int
    max_context: int | None  # tokens it reads at most; None: no limit
    num_layers: int | None
    attentions: list[str] | None  # that its architecture has; None: not known
    stored_as: str | None  # how weights in few bits lie there, in words; None: plain ones
    router_balance: dict[str, Any] | None  # the loss of its routers, where its config asks for it
    stop_ids: tuple[int, ...]  # at which its text ends, as its own files have it
    classes: tuple[str, ...] | None  # of a classifier; None: it is none
    head: str | None  # by which it tells them apart, see `shared.loading.head_of`
    load_tokenizer: Callable[[], Any]  # of transformers


def describe(
    option: str, model: str, *, revision: str | None, trusted: bool, cache: Path
) -> ModelDescription:
    """The description of the model that an option names. Raises ConfigError where it cannot be
    read, HandshakeError for a tokenizer without a fast form."""
    asked = {"revision": revision or "main", "trust_remote_code": trusted}

    @once
    def load_tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model, **asked)

    def read() -> dict[str, Any]:
        from transformers import (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
            AutoConfig,
        )

        if option == "student.model":  # of this kind is one of our own
            from student_trainer.models import bag  # noqa: F401

        step = "config.json"
        try:
            config = AutoConfig.from_pretrained(model, **asked)
            step = "tokenizer"
            tokenizer = load_tokenizer()
        except Exception as error:  # invalid fields of a config have classes of their own
            raise ConfigError(_why_unreadable(option, model, error, step)) from None
        text_config = config.get_text_config()
        refuse_odd_positions(option, model, text_config)
        identity = identify(tokenizer)
        known, classes = MODEL_FOR_CAUSAL_LM_MAPPING, classes_of(config)
        if (head := head_of(config)) is not None:
            known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
            if head == OF_WORDS:
                known = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
        model_class = known.get(type(config), None)
        return {
            "identity": asdict(identity),
            "rows_digest": rows_digest(tokenizer, identity),
            "vocab_size": text_config.vocab_size,
            "hidden_size": getattr(text_config, "hidden_size", 0),
            "max_context": longest_context(text_config),
            "num_layers": getattr(text_config, "num_hidden_layers", None),
            "stored_as": stored_as(config),
            "router_balance": router_balance_of(config),
            "attentions": None if model_class is None else list(offered_by(model_class)),
            "stop_ids": _stop_ids(model, text_config, revision=asked["revision"]),
            "classes": classes,
            "head": head,
        }

    facts = kept(read, model, asked | {"of": "model"}, cache=cache)
    identity = TokenizerIdentity.from_dict(facts.pop("identity"))
    facts["stop_ids"] = tuple(facts["stop_ids"])
    facts["classes"] = None if facts["classes"] is None else tuple(facts["classes"])
    return ModelDescription(option, model, identity, **facts, load_tokenizer=load_tokenizer)


def _stop_ids(model: str, text_config: Any, *, revision: str) -> list[int]:
    """Those of generation_config.json, or of config.json where there is none."""
    from transformers import GenerationConfig

    found = getattr(text_config, "eos_token_id", None)
    with suppress(Exception):  # it has none, or one that transformers cannot read
        found = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    stops = found if isinstance(found, list) else [found]
    return [stop for stop in stops if isinstance(stop, int) and stop >= 0]


def _why_unreadable(option: str, model: str, error: Exception, step: str) -> str:
    """Why a model's `step`, its tokenizer or config.json, cannot be read, and the way out."""
    trust = f"{option.rpartition('.')[0]}.trust_remote_code"
    if (reason := untrusted(error, trust=trust)) is not None:
        return f"{option} is {model!r}: {reason}"
    if not Path(model).is_dir():
        what = "which is neither a folder under paths.root nor a model the hub gives us"
    elif damaged := _damaged_json(Path(model)):
        return f"{option} is {model!r}, whose {damaged}; get it again"
    else:
        what = f"whose {step} transformers cannot read"
    reason = first_line(error).rstrip(".")
    if "backend tokenizer" in reason:
        what, reason = (
            "whose files transformers cannot read",
            ("they hold no tokenizer (tokenizer.json), nor what one is made from"),
        )
    return f"{option} is {model!r}, {what}: {reason}; correct its files or name another model"


def _damaged_json(folder: Path) -> str | None:
    """The first file of a model that is to hold JSON and does not, and why."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:  # no UTF-8 among them
            return f"{path.name} is not valid JSON ({first_line(error)})"
    return None


def refuse_odd_positions(option: str, model: str, text_config: Any) -> None:
    """Raise ConfigError for lists of factors of rotary positions that are not one for each pair of
    a head's numbers: transformers takes a single one for all, and a short list at long rows only.
    """
    told = getattr(text_config, "rope_parameters", None) or {}
    for kind in (told, *(part for part in told.values() if isinstance(part, dict))):
        named = {name: kind.get(name) for name in ("short_factor", "long_factor")}
        sizes = {name: len(found) for name, found in named.items() if isinstance(found, list)}
        if 1 in sizes.values() or len(set(sizes.values())) > 1:
            said = " and ".join(f"{size} in {name}" for name, size in sizes.items())
            raise ConfigError(
                f"{option} is {model!r}, whose config.json has factors of positions, {said}, that "
                "are not one for each pair of a head's numbers; correct its config.json"
            )


def student_trust(config: Config) -> Trust:
    """What units of the student are trusted for, probed once per model, way to train and context.

    Raises ConfigError for a student that the workers could not train either, OtherRouterLoss for
    one whose routers have another loss than asked.
    """

    def probe() -> dict[str, Any]:
        try:
            return asdict(task_of(config).trust(config))
        except OtherRouterLoss as error:  # kept too: a start goes on without that loss
            return {"refused": str(error)}

    student = config.student.model_dump(mode="json")
    asked = student | {"of": "trust", "context": config.data.context}
    routed = [loss for loss in config.losses if loss.kind == "router_balance"]
    asked |= {"router_balance": [loss.model_dump() for loss in routed]} if routed else {}
    asked |= {"classes": config.task.classes} if config.task.classifies else {}
    asked |= {"task": config.task.kind} if config.task.sees else {}
    found = kept(probe, config.student.model, asked, cache=Path(config.paths.cache))
    if "refused" in found:
        raise OtherRouterLoss(found["refused"])
    return Trust(found["packed"], Passes.from_dict(found["passes"]))


def refuse_unloadable(config: Config) -> None:
    """Raise ConfigError for a teacher in a local folder whose weights, or those of the adapter on
    them, are not those of its config; what a hub has is looked at by whoever loads it."""
    for name, teacher in config.teachers.items():
        if teacher.engine == "similarity" or not Path(teacher.model).is_dir():
            continue
        adapter = teacher.adapter if teacher.adapter and Path(teacher.adapter).is_dir() else None
        asked = {
            "revision": teacher.revision,
            "trust_remote_code": teacher.trust_remote_code,
            "attention": teacher.attention,
            "adapter": adapter,
            "gpus": teacher.gpus,
            "tensor_parallel": teacher.tensor_parallel,
            "section": f"teachers.{name}",
        }

        def find(model: str = teacher.model, asked: dict[str, Any] = asked) -> dict[str, Any]:
            from teacher_service.engine import loading  # slow, as torch is

            loading.refuse_unloadable(model, **asked)
            return {}

        files = {"of": "weights", "adapter_files": adapter and files_of(Path(adapter))}
        kept(find, teacher.model, asked | files, cache=Path(config.paths.cache))


def kept(
    find: Callable[[], dict[str, Any]], model: str, asked: Mapping[str, Any], *, cache: Path
) -> dict[str, Any]:
    """What `find` found for a model in a local folder the last time, while nothing has changed
    that decides it; a model of a hub is looked at every time."""
    if not Path(model).is_dir():
        return find()
    versions = {name: version(name) for name in READERS}
    decisive = json.dumps([FORMAT, model, asked, files_of(Path(model)), versions], sort_keys=True)
    digest = xxhash.xxh3_128_hexdigest(decisive.encode())
    path = cache.expanduser() / "descriptions" / f"{digest}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    found = find()
    with suppress(OSError, StorageError):  # the next run looks again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found))
    return found


def files_of(folder: Path) -> dict[str, list[int] | str]:
    """Every file of a model, those of subfolders (named chat templates) among them: weights by
    size and time, others by content."""
    below = (path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path for path in below}
    weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    return {
        name: [path.stat().st_size, path.stat().st_mtime_ns]
        if path.suffix in weights
        else xxhash.xxh3_128_hexdigest(path.read_bytes())
        for name, path in files.items()
    }
