"""What a model's folder lacks, or holds instead of plain weights, and the way out."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from cluster.planning.description import ModelDescription
from shared.config.run import Config, Teacher
from shared.errors import ConfigError
from shared.text.formats import LFS_POINTER

WEIGHTS, INDEX = "*.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def refuse_incomplete(option: str, model: str) -> None:
    """Refuse a local model folder that lacks config or weights, or holds pointers of Git LFS in
    their place. Raises ConfigError."""
    folder = Path(model)
    if not folder.is_absolute():
        return  # a name on the hub
    _refuse_pointers(option, folder)
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not any(folder.glob(WEIGHTS)) and not (folder / INDEX).exists():
        missing.append(_other_weights(folder))
    if missing:
        raise ConfigError(
            f"{option} is {model}, a folder without {' and '.join(missing)}; name a folder "
            "written by save_pretrained"
        )
    _refuse_lost_shards(option, folder)


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
