"""What has no meaning in a task is refused in a sentence that says what to do."""

from typing import Any

import pytest
from pydantic import ValidationError

from shared.config.run import Config

BASE: dict[str, Any] = {
    "name": "run",
    "steps": 2,
    "task": "classification",
    "teachers": {"t": {"model": "large"}},
    "student": {"model": "small"},
    "domains": {"kinds": {"train": "rows.jsonl"}},
}

MEANINGLESS = [
    (
        {"weighting": {"policy": "instance_weights", "centre": "median"}},
        "weighting.centre is median, a statistic of tokens; set it to running or a number",
    ),
    ({"losses": [{"kind": "atkd"}]}, "losses has a atkd, of language models; take it out"),
    (
        {"losses": [{"kind": "hidden_states", "layers": {1: 1}}]},
        "losses has a hidden_states, of language models; take it out",
    ),
    ({"source": "student"}, "source has text that models write, which has no class; remove it"),
    ({"prompts": "p.yaml"}, "prompts is set; write what the teacher is shown in task.template"),
    ({"targets": {"exact": "last_hidden"}}, "targets.exact is last_hidden, and classes are exact"),
    ({"targets": {"selector": "top_k"}}, "targets.selector is top_k, and all classes are told"),
    ({"targets": {"student_ids": 4}}, "targets.student_ids is set, and all classes are told"),
    ({"evaluation": {"kl": "bucketed"}}, "evaluation.kl is bucketed, and all classes are told"),
    ({"data": {"too_long": "split_with_prompt"}}, "set it to cut, drop or refuse"),
    (
        {"student": {"model": "small", "train": {"kind": "qlora"}}},
        "student.train.kind is qlora, which quantises a head that trains; take lora or full",
    ),
    (
        {"student": {"model": "small", "upcycle": {"experts": 4}}},
        "student.upcycle is set, of language models; remove it",
    ),
    (
        {"progressive": {"phases": 2}, "steps": 100},
        "progressive is set, whose phases are of tokens; remove it",
    ),
    (
        {"teachers": {"t": {"model": "large", "engine": "vllm", "python": "/vllm/bin/python"}}},
        "teachers.t.engine is vllm; set it to transformers",
    ),
    (
        {"teachers": {"t": {"model": "large", "follow_student": {"lag": 2}}}},
        "teachers.t.follow_student is set, of language models; remove it",
    ),
    (
        {"domains": {"kinds": {"train": "rows.jsonl", "columns": {"prompt": "question"}}}},
        "domains.kinds.columns names prompt; name text and label alone",
    ),
]


@pytest.mark.parametrize(("options", "said"), MEANINGLESS)
def test_what_has_no_meaning_for_classes_is_refused(options, said):
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(BASE | options)
    message = str(raised.value)
    assert "task is classification, but " in message
    assert said in message


SECTIONS = [
    ({"template": "What is it?"}, "without {text}, so that the teacher would not see the row"),
    ({"labels": ["one"]}, "name two classes or more, each once"),
    ({"labels": ["one", "one"]}, "name two classes or more, each once"),
    ({"labels": ["a", "b"], "verbaliser": {"c": "see"}}, "verbaliser names c, which is not among"),
]


@pytest.mark.parametrize(("section", "said"), SECTIONS)
def test_a_section_that_cannot_be_meant_is_refused(section, said):
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(BASE | {"task": {"kind": "classification", **section}})
    assert said in str(raised.value)


def test_a_label_column_is_of_a_task_that_classifies():
    domains = {"kinds": {"train": "rows.jsonl", "columns": {"label": "intent"}}}
    assert Config.model_validate(BASE | {"domains": domains}).task.classifies
    with pytest.raises(ValidationError, match="set task=classification, or remove it"):
        Config.model_validate(BASE | {"domains": domains, "task": "language_model"})


def test_a_task_is_named_by_its_kind_alone_or_with_its_options():
    by_name = Config.model_validate(BASE)
    assert by_name == Config.model_validate(BASE | {"task": {"kind": "classification"}})
    plain = {name: value for name, value in BASE.items() if name != "task"}
    assert not Config.model_validate(plain).task.classifies


MARKING: dict[str, Any] = {
    "task": "marking",
    "student": {"model": "small", "zero": 1},
    "losses": [{"kind": "cross_entropy"}, {"kind": "entity_contrast", "layer": 1}],
    "domains": {"names": {"train": "rows.jsonl", "validation": "held.jsonl"}},
}
UNMARKED = [
    ({"student": {"model": "small", "zero": 3}}, "student.zero is 3, .*; set it to 2 or less"),
    ({"source": "student"}, "source has text that models write, without marks; set source=dataset"),
    ({"augmentation": {"share": 0.5, "swap": 0.1}}, "augmentation changes what is to be copied"),
    ({"data": {"loss_on": "everything"}}, "set data.loss_on=responses"),
    ({"data": {"too_long": "cut"}}, "data.too_long is cut, and a copy is whole; .*drop or refuse"),
    ({"domains": {"names": {"train": "rows.jsonl"}}}, "domains.names has no validation; name some"),
    (
        {"teachers": {"t": {"model": "large"}, "u": {"model": "other"}}},
        "losses has an entity_contrast and teachers has 2; keep one",
    ),
    ({"task": {"kind": "marking", "template": "Mark {text}"}}, "without {type}, or without one"),
    ({"task": "language_model"}, "an entity_contrast, of marked entities; set task=marking"),
]


@pytest.mark.parametrize(("options", "said"), UNMARKED)
def test_what_has_no_meaning_for_marked_entities_is_refused(options, said):
    assert Config.model_validate(BASE | MARKING).task.kind == "marking"
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(BASE | MARKING | options)
