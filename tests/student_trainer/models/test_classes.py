"""A model is told the classes of a run, and nothing else of it changes."""

from typing import Any

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
)

from shared.config.tasks.task import tags_of
from shared.errors import ConfigError
from student_trainer.models.classes import name_classes

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
TAGS = tags_of(["a", "b"])


@pytest.mark.parametrize(
    "auto", [AutoModelForTokenClassification, AutoModelForSequenceClassification]
)
def test_dropout_that_a_model_asks_for_stays(auto):
    config = BertConfig(hidden_dropout_prob=0.2, **SIZES)
    name_classes(config, TAGS if auto is AutoModelForTokenClassification else ["x", "y"], model="m")
    assert auto.from_config(config).dropout.p == 0.2


def test_a_head_for_tags_on_a_causal_model_has_no_dropout_that_nobody_asks_for():
    config = LlamaConfig(**SIZES)
    assert AutoModelForTokenClassification.from_config(config).dropout.p > 0
    name_classes(config, TAGS, model="m")
    assert AutoModelForTokenClassification.from_config(config).dropout.p == 0
    asked = LlamaConfig(classifier_dropout=0.3, **SIZES)
    name_classes(asked, TAGS, model="m")
    assert AutoModelForTokenClassification.from_config(asked).dropout.p == 0.3


LEARNT = [
    (tags_of(["b", "a"]), r"in another order apart, .*; set task.types to \['b', 'a'\]"),
    (["O", "B-a", "B-b", "I-a", "I-b"], "in another order apart, .*; name a model without a head"),
    (["B-a", "I-a", "B-b", "I-b", "O"], "in another order apart, .*; name a model without a head"),
    (["O", "B-a"], "other classes, as O apart, .*; name a model without a head"),
]


@pytest.mark.parametrize(("known", "said"), LEARNT)
def test_a_head_that_has_learnt_other_tags_is_refused_with_a_way_out_that_leads_out(known, said):
    heads = {"architectures": ["BertForTokenClassification"], "id2label": dict(enumerate(known))}
    with pytest.raises(ConfigError, match=said):
        name_classes(BertConfig(**SIZES, **heads), TAGS, model="m")
