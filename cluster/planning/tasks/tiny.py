"""`student.model: tiny`, a classifier of about 0.03 million weights, made for a run's classes."""

import json
from pathlib import Path

import xxhash

from cluster.builtin.models import renamed_into_place
from cluster.planning.handshake import describe_teacher
from shared.config.run import Config
from shared.errors import ConfigError
from shared.locking import alone

TINY = "tiny"


def with_tiny(config: Config) -> Config:
    """The config with the folder of the network that it asks for as `tiny`, made in the cache where
    it is not there, with the tokenizer of the first teacher. Raises ConfigError for a task without
    classes."""
    if config.student.model != TINY:
        return config
    if not config.task.classifies:
        raise ConfigError(
            "student.model is tiny, which tells classes apart, but task is language_model; set "
            "task=classification, or name another student"
        )
    if config.student.train.kind != "full":
        raise ConfigError(
            f"student.train.kind is {config.student.train.kind}, but student.model is tiny, which "
            "has little to adapt; set student.train.kind=full"
        )
    cache = Path(config.paths.cache).expanduser().absolute()
    (name, teacher), *_ = config.teachers.items()
    described = describe_teacher(name, teacher, cache=cache)
    decides = [config.task.classes, config.seed, described.rows_digest]
    key = xxhash.xxh3_64_hexdigest(json.dumps(decides).encode())
    folder = cache / "tiny" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f"{key}.lock"), making="the tiny student"):
        if not folder.is_dir():
            with renamed_into_place(folder) as scratch:
                _save(scratch, config, described.load_tokenizer())
    student = config.student.model_copy(update={"model": str(folder)})
    return config.model_copy(update={"student": student})


def _save(folder: Path, config: Config, tokenizer) -> None:
    import torch

    from student_trainer.models.bag import BagConfig, BagForSequenceClassification
    from student_trainer.models.classes import name_classes

    sizes = BagConfig(vocab_size=len(tokenizer))
    name_classes(sizes, config.task.classes, model=TINY)
    torch.manual_seed(config.seed)
    BagForSequenceClassification(sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
