"""What a model of transformers is told of the classes of a run, and which of its weights tell them
apart."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification

from shared.config.models.student import Student
from shared.config.tasks.task import OUTSIDE, tags_of
from shared.errors import ConfigError
from shared.loading import classes_of
from shared.model_parts import pad_with

# In names of weights that some families keep below their body and make anew with a head.
OF_HEAD = ("pooler", "summary")


def name_classes(config: Any, labels: Sequence[str], *, model: str) -> None:
    """Tell a model's config of transformers its classes. Raises ConfigError for a model that has
    learnt others, or these in another order."""
    known = _learnt(config)
    if known and known != list(labels):
        alike = sorted(known) == sorted(labels)
        what = "the same classes in another order" if alike else f"other classes, as {known[0]}"
        way_out = "name a model without a head"
        if alike and OUTSIDE not in known:
            way_out = f"set task.labels to {known}"
        elif alike and tags_of(types := [t[2:] for t in known if t.startswith("B-")]) == known:
            way_out = f"set task.types to {types}"
        raise ConfigError(
            f"student.model: {model} tells {what} apart, and not {list(labels)!s:.80} in this "
            f"order; {way_out}"
        )
    if _drops_a_tenth(config) and OUTSIDE in labels:
        config.classifier_dropout = 0.0
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"  # of whole texts; others do not read it


def _drops_a_tenth(config: Any) -> bool:
    """Whether transformers puts dropout before a head for tags that the config does not ask for, as
    it does for causal families."""
    head: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    asked = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
    is_general = head is not None and issubclass(head, GenericForTokenClassification)
    return is_general and all(share is None for share in asked)


def _learnt(config: Any) -> list[str]:
    """The classes of a model that has a head for some; empty where it has none, or does not name
    them."""
    named = list(classes_of(config) or ())
    is_unnamed = named == [f"LABEL_{number}" for number in range(len(named))]
    return [] if is_unnamed else named


def keep_padding(model: PreTrainedModel, asked: Student) -> int:
    """Let a model know the padding token of the tokenizer that it is asked with, see `pad_with`."""
    tokenizer = AutoTokenizer.from_pretrained(
        asked.model,
        revision=asked.revision or "main",
        trust_remote_code=asked.trust_remote_code,
    )
    return pad_with(model, tokenizer)


def is_of_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is one that tells classes apart, which a model without a head lacks."""
    below_body = name.startswith(f"{model.base_model_prefix}.")
    return not below_body or any(part in name for part in OF_HEAD)
