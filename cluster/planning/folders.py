"""What a model's folder lacks, or holds instead of plain weights, and the way out."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.planning.description import ModelDescription
from shared.config.models.teachers import Teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.text.formats import LFS_POINTER

WEIGHTS, INDEX = "*.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def refuse_incomplete(option: str, model: str) -> None:
    """Refuse a local model folder that lacks config or weights, or holds pointers of Git LFS in
    their place. Raises ConfigError."""
    folder = Path(model)
    if not folder.is_absolute():
        return  # a name on the hub
    _refuse_pointers(option, folder)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    weights = [path for path in sorted(folder.glob(WEIGHTS)) if path.is_file()]
    if not weights and not (folder / INDEX).exists():
        missing.append(_other_weights(folder))
    if missing:
        raise ConfigError(
            f"{option} is {model}, a folder without {' and '.join(missing)}; name a folder "
            "written by save_pretrained"
        )
    _refuse_no_objects(option, folder)
    _refuse_lost_shards(option, folder)
    for path in weights:
        _refuse_integers(option, folder, path)


def refuse_incomplete_teacher(name: str, teacher: Teacher) -> None:
    """Refuse a teacher whose local folder, or that of the PEFT adapter on it, is not whole. Raises
    ConfigError."""
    refuse_incomplete(f"teachers.{name}.model", teacher.model)
    if teacher.adapter is not None:
        refuse_incomplete_adapter(f"teachers.{name}.adapter", teacher.adapter)


def refuse_incomplete_adapter(option: str, adapter: str) -> None:
    """Refuse a local folder that is not a whole PEFT adapter. Raises ConfigError."""
    folder = Path(adapter)
    if not folder.is_absolute():
        return
    _refuse_pointers(option, folder)
    missing = [name for name in ADAPTER if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"{option} is {adapter}, a folder without {' and '.join(missing)}; name a folder "
            "written by save_pretrained of peft"
        )


def _refuse_pointers(option: str, folder: Path) -> None:
    small = [f for f in sorted(folder.iterdir()) if f.is_file() and f.stat().st_size < 1024]
    pointers = [file.name for file in small if file.read_bytes().startswith(LFS_POINTER)]
    if pointers:
        raise ConfigError(
            f"{option} is {folder}, where {', '.join(pointers[:3])} is a pointer of Git LFS in "
            "place of the file; run `git lfs pull` in that folder"
        )


def _refuse_no_objects(option: str, folder: Path) -> None:
    """Refuse settings that are JSON and no object; what is no JSON is told by who reads it."""
    for name in SETTINGS:
        found = _json_of(folder / name)
        if not isinstance(found, dict):
            raise ConfigError(
                f"{option} is {folder}, whose {name} holds no JSON object but "
                f"{json.dumps(found):.40}; get it again"
            )


def _json_of(path: Path) -> Any:
    """What a file of JSON holds; an empty object where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _refuse_integers(option: str, folder: Path, path: Path) -> None:
    """Refuse matrices of integers, which are numbers in few bits, where no config says by what to
    multiply them."""
    if "quantization_config" in _json_of(folder / "config.json"):
        return
    for name, (dtype, num_dims) in _stored(path).items():
        if name.endswith(".weight") and num_dims > 1 and dtype.startswith(("I", "U")):
            raise ConfigError(
                f"{option} is {folder}, where {name} in {path.name} is stored in integers "
                f"({dtype}) and config.json has no quantization_config that says how to read "
                "them; get the whole folder, or name an unquantised model"
            )


def _stored(path: Path) -> dict[str, tuple[str, int]]:
    """Dtype and number of dimensions of each tensor in a file of safetensors; nothing of a damaged
    one, which is told by who reads it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (part.get_dtype(), len(part.get_shape())) for n, part in slices.items()}
    except (OSError, SafetensorError):
        return {}


def _other_weights(folder: Path) -> str:
    """Weights, and those of other formats that are there."""
    others = [
        f.name for end in ("bin", "pt", "pth", "gguf") for f in sorted(folder.glob(f"*.{end}"))
    ]
    beside = f", with {others[0]} in a format that is not read" if others else ""
    return f"weights (*.safetensors){beside}"


def _refuse_lost_shards(option: str, folder: Path) -> None:
    """Refuse weights in several files of which some, or the list of what lies where, are not
    there."""
    index = folder / INDEX
    named: set[str] = set()
    if index.exists():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{option} is {folder}, whose {INDEX} cannot be read ({type(error).__name__}); "
                "get it again"
            ) from None
    elif not (folder / "model.safetensors").exists():
        shards = [found for f in folder.glob(WEIGHTS) if (found := SHARD.fullmatch(f.name))]
        if shards:
            raise ConfigError(
                f"{option} is {folder}, which holds {len(shards)} of {int(shards[0][1])} files of "
                f"weights and no {INDEX}, which says what lies where; get the whole folder"
            )
    lost = sorted(name for name in named if not (folder / name).exists())
    if lost:
        raise ConfigError(
            f"{option} is {folder}, which lacks {', '.join(lost[:3])} of its {len(named)} files of "
            "weights; get the whole folder"
        )


def refuse_quantised(
    config: Config, teachers: Mapping[str, ModelDescription], student: ModelDescription
) -> None:
    """Raise ConfigError for a student whose weights lie there in few bits, which do not train, and
    for a teacher that is to be quantised a second time."""
    if student.stored_as is not None:
        raise ConfigError(
            f"student.model {config.student.model} is stored {student.stored_as}, and such weights "
            "do not train; name its unquantised base, and student.train.kind=qlora to train "
            "adapters on a base in nf4"
        )
    for name, described in teachers.items():
        asked = config.teachers[name].quantisation
        if described.stored_as is not None and asked != "none":
            raise ConfigError(
                f"teachers.{name}.quantisation is {asked}, but {described.name} is already stored "
                f"{described.stored_as}; set teachers.{name}.quantisation=none"
            )
