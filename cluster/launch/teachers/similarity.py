"""A run's own teacher without a model: soft labels from how alike the training texts of classes
are."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock

from cluster.planning.description import files_of
from shared.config.models.teachers import Teacher
from shared.data.row_cache import storage_errors
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.errors import ConfigError
from shared.in_words import counted
from shared.loading import first_line
from shared.prompts.prefix import shown
from shared.run.run_dir import write_atomically
from teacher_service.engine.classes.soft_labels import SoftLabelEngine
from teacher_service.engine.classes.texts import labels_of, texts_of
from teacher_service.engine.description import MakeEngine

if TYPE_CHECKING:
    from cluster.planning.preparation import Launch

ROWS = 1024  # read at a time
FORMAT = 1  # of what is kept


def with_similarity(launch: "Launch", make_engine: MakeEngine) -> MakeEngine:
    """What makes the engine of one teacher's part, with soft labels where it has no model; they are
    kept in the cache. Raises ConfigError for classes that are not told apart."""
    teacher = launch.prepared.teacher
    if teacher.engine != "similarity":
        return make_engine
    label_CC = np.array(_kept(launch))
    fingerprint = {
        "model": Path(teacher.model).name,
        "adapter": "",
        "dtype": teacher.dtype,
        "quantisation": "none",
        "engine": "similarity",
        "soft_labels": xxhash.xxh3_128_hexdigest(label_CC.tobytes()),
    }
    return partial(SoftLabelEngine, tuple(launch.config.task.classes), label_CC, fingerprint)


def _kept(launch: "Launch") -> list[list[float]]:
    """The soft labels of a run, from the cache or found."""
    folder = Path(launch.config.paths.cache).expanduser().absolute() / "similarity"
    path = folder / f"{_key(launch)}.json"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            with suppress(OSError, ValueError):
                return json.loads(path.read_text())
            found = _found(launch).tolist()
            write_atomically(path, json.dumps(found))
    return found


def _key(launch: "Launch") -> str:
    """A hash of all that decides them."""
    config, prepared, teacher = launch.config, launch.prepared, launch.prepared.teacher
    folder = Path(teacher.model)
    decides = {
        "format": FORMAT,
        "rows": [Path(domain.train_path).parent.name for domain in prepared.domains],
        "read": prepared.showing.prompts,
        "classes": config.task.classes,
        "model": files_of(folder) if folder.is_dir() else [teacher.model, teacher.revision],
        "similarity": teacher.similarity.model_dump(),
        "seed": config.seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _found(launch: "Launch") -> np.ndarray:
    """Probabilities [C, C], a row for each class. Raises ConfigError."""
    from teacher_service.engine.classes import similarity as alike  # slow, as torch is

    config, (name,) = launch.config, launch.config.teachers
    asked, classes = launch.prepared.teacher.similarity, config.task.classes
    rows = list(_training_rows(launch))
    label_N = np.concatenate([labels_of(part) for part in rows])
    _refuse_alone(np.bincount(label_N, minlength=len(classes)), classes)
    means_ND = alike.mean_embeddings(
        _embeddings(launch.prepared.teacher), [text for part in rows for text in texts_of(part)]
    )
    codes_NE = alike.codes_of(means_ND, epochs=asked.passes, seed=config.seed)
    similarity_CC = alike.similarities(
        codes_NE, label_N, num_classes=len(classes), samples=asked.samples, seed=config.seed
    )
    option = f"teachers.{name}.similarity"
    return alike.soft_labels(similarity_CC, diagonal=asked.diagonal, classes=classes, option=option)


def _training_rows(launch: "Launch") -> Iterator[Rows]:
    """The training rows of all domains as the model's tokenizer has them."""
    openings = launch.prepared.showing.openings
    for domain in launch.prepared.domains:
        store = RowStore.open(domain.train_path)
        for first in range(0, len(store), ROWS):
            last = min(first + ROWS, len(store))
            yield shown(store.take(list(range(first, last))), openings)


def _refuse_alone(count_C: np.ndarray, classes: Sequence[str]) -> None:
    for label, count in zip(classes, count_C, strict=True):
        if count < 2:
            raise ConfigError(
                f"class {label} has {counted(count, 'training row')}, and engine similarity "
                "compares two or more of a class; add rows of it, or take it out"
            )


def _embeddings(teacher: Teacher) -> Any:
    """The token embeddings of its model [V, D], of torch. Raises ConfigError."""
    from transformers import AutoModel  # slow

    asked = {"revision": teacher.revision or "main", "trust_remote_code": teacher.trust_remote_code}
    try:
        model = AutoModel.from_pretrained(teacher.model, **asked, use_safetensors=True)
        return model.get_input_embeddings().weight.detach().float()
    except Exception as error:  # of a model's own code and of every library it needs
        raise ConfigError(
            f"the token embeddings of {teacher.model} cannot be read: {first_line(error)}; name "
            "another model"
        ) from error
