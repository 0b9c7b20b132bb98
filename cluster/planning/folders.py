"""What a model's folder holds instead of a whole model in plain weights, and the way out."""

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.planning.description import ModelDescription
from shared.config.run import Config
from shared.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"


def refuse_adapter(option: str, model: str) -> None:
    """Raise ConfigError for a folder that holds a PEFT adapter and no model, with the option that
    takes it."""
    folder = Path(model)
    if not (folder / ADAPTER_CONFIG).exists() or _has_model(folder):
        return
    base = _base(folder)
    if option.startswith("teachers."):
        owner = option.rpartition(".")[0]
        way_out = f"set {option} to {base} and {owner}.adapter to {model}"
    else:
        way_out = (
            "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
            f".save_pretrained(FOLDER), BASE being {base}, save the tokenizer there too, and set "
            f"{option} to FOLDER"
        )
    raise ConfigError(f"{option} is {model}, a PEFT adapter and not a whole model; {way_out}")


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


def _has_model(folder: Path) -> bool:
    weights = [path.name for path in folder.glob("*.safetensors")]
    whole = [name for name in weights if not name.startswith("adapter_")]
    return (folder / "config.json").exists() and bool(whole)


def _base(folder: Path) -> str:
    try:
        return json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        return "its base"
