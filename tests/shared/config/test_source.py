"""What a config may say of where its tokens come from."""

import pytest
from pydantic import ValidationError

from shared.config.run import Config

BASE = {
    "name": "a",
    "steps": 4,
    "teachers": {"t": {"model": "t"}},
    "student": {"model": "s"},
    "domains": {"d": {"train": "d.jsonl"}},
}


def config(source, **options) -> Config:
    return Config.model_validate(BASE | {"source": source} | options)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ("dataset", (1, 0, 0)),
        ("student", (0, 1, 0)),
        ("teacher", (0, 0, 1)),
        ({"student": 1}, (0, 1, 0)),
        ({"student": 0.25, "dataset": 0.75}, (0.75, 0.25, 0)),
        ({"teacher": 0.5, "student": 0.25, "dataset": 0.25}, (0.25, 0.25, 0.5)),
        ({"student": 1, "max_new_tokens": 5}, (0, 1, 0)),
    ],
)
def test_a_source_is_a_name_or_shares(given, shares):
    source = config(given).source
    assert (source.dataset, source.student, source.teacher) == shares
    assert source.first_share == 1 - source.dataset
    assert source.writes == (source.student > 0)
    assert source.is_dataset == (source.dataset == 1)
    assert Config.model_validate(config(given).model_dump(mode="json")) == config(given)


@pytest.mark.parametrize(
    ("options", "lag"),
    [
        ({}, 1),
        ({"mixture": {"policy": "ddk", "interval": 2, "lag_steps": 0}}, 0),
        ({"targets": {"student_ids": 4}, "losses": [{"kind": "reverse_kl"}]}, 0),
    ],
)
def test_the_lag_is_one_step_where_steps_are_asked_ahead(options, lag):
    assert config("student", **options).rollout_lag == lag
    assert config({"student": 1, "lag": 0}, **options).rollout_lag == 0


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (
            "tutor",
            {},
            "is 'tutor'; take dataset, student, teacher, adaptive, or shares of the first three",
        ),
        ({"updates": 2}, {}, "source.updates is 2, but the student writes nothing"),
        ({"draws": 2}, {}, "source.draws is 2, but source has teacher 0"),
        ({"student": 1, "draws": 3}, {}, "source.draws is 3, but source has teacher 0"),
        ({"lag": 1}, {}, "source.lag is 1, but the student writes nothing"),
        ({"teacher": 1, "lag": 0}, {}, "source.lag is 0, but the student writes nothing"),
        (
            {"student": 1, "updates": 2},
            {"mixture": {"policy": "odm", "interval": 2, "lag_steps": 1}},
            "source.updates is 2, .* decide its weights from step to step",
        ),
        ({"adaptive": {}, "student": 1}, {}, "has adaptive, which decides how much"),
        ("adaptive", {"losses": [{"kind": "cross_entropy"}]}, "source has adaptive, but no loss"),
        ("adaptive", {"baseline": True}, "source has adaptive, but baseline trains a copy"),
        (
            {"student": 0.4, "teacher": 0.7},
            {},
            "dataset 0 and student 0.4 and teacher 0.7, which sum to 1.1; shares sum to 1",
        ),
        ({"student": 0.4}, {}, "dataset 0 and student 0.4, which sum to 0.4; shares sum to 1"),
        ({"student": 0.5, "dataset": 0.6}, {}, "which sum to 1.1"),
        ({"student": 0.5, "dataset": 0.501}, {}, "which sum to 1.001; shares sum to 1"),
        *(
            (
                {"student": 1, name: value},
                {"losses": [{"kind": "policy_gradient"}]},
                "whose rewards compare the teacher with the student as it is, but source has",
            )
            for name, value in (("top_p", 0.9), ("min_new_tokens", 1))
        ),
        ({"teacher_mix": 0.2}, {}, "teacher_mix is 0.2, .* but source has student 0; give the"),
        ({"student": 1, "teacher_mix": 1.2}, {}, "less than or equal to 1"),
        ({"student": 1, "teacher_mix": -0.1}, {}, "greater than or equal to 0"),
        (
            {"student": 1, "teacher_mix": 0.2, "temperature": 0},
            {},
            "teacher_mix is 0.2, but source.temperature is 0, at which",
        ),
        (
            {"student": 1, "teacher_mix": 0.2},
            {"rollouts": {"replicas": 2}},
            "teacher_mix is 0.2, .* but rollouts.replicas is 2, whose copies ask nobody",
        ),
        (
            {"student": 1, "teacher_mix": 0.2},
            {
                "teachers": {"a": {"model": "a"}, "b": {"model": "b"}},
                "domains": {"d": {"train": "d.jsonl", "teacher": {"a": 1, "b": 2}}},
                "targets": {"exact": "last_hidden"},
            },
            "teacher_mix is 0.2, but domains.d.teacher averages a and b, and a token",
        ),
        (
            {"student": 1, "teacher_mix": 0.2},
            {"teachers": {"t": {"model": "t", "engine": "vllm", "python": "/p"}}},
            "engine is vllm, .* but source.teacher_mix has it write token by token",
        ),
        (
            {"student": 1, "max_new_tokens": 512},
            {},
            r"max_new_tokens is 512, .* data.context 512; lower one",
        ),
        (
            {"student": 1, "min_new_tokens": 9, "max_new_tokens": 8},
            {},
            "min_new_tokens is 9, more than source.max_new_tokens 8",
        ),
        (
            {"student": 1, "lag": 2},
            {"mixture": {"policy": "ddk", "interval": 2, "lag_steps": 1}},
            "source.lag is 2, but steps are asked about at most 1 ahead",
        ),
        (
            {"student": 1, "lag": 1},
            {"targets": {"student_ids": 4}, "losses": [{"kind": "reverse_kl"}]},
            "source.lag is 1, but steps are asked about at most 0 ahead",
        ),
        ("student", {"losses": [{"kind": "cross_entropy"}]}, "no loss asks a teacher"),
        (
            "student",
            {"losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]},
            "cross_entropy, which learns from nothing that the student wrote, but source has "
            "student 1",
        ),
        (
            {"adaptive": {"start": 1}},
            {"losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]},
            "cross_entropy, .* but source has adaptive.start 1, which never falls; give",
        ),
        (
            {"student": 0.5, "teacher": 0.5},
            {"losses": [{"kind": "cross_entropy"}]},
            "source has student 0.5 and teacher 0.5, but no loss asks a teacher",
        ),
        ({"teacher": 1, "max_new_tokens": 512}, {}, "leaves no room for a prompt"),
        ("teacher", {"baseline": True}, "source has teacher 1, but baseline trains a copy"),
        (
            "teacher",
            {"targets": {"teacher_free": True, "store": "store"}},
            "source has teacher 1, but targets.teacher_free leaves no teacher to write",
        ),
        (
            "teacher",
            {"losses": [{"kind": "policy_gradient"}]},
            "policy_gradient, which learns from what the student writes, but source has student 0",
        ),
        (
            "teacher",
            {"mixture": {"policy": "doremi", "interval": 2, "lag_steps": 1}},
            "policy is doremi, which compares losses on the data set",
        ),
        (
            "dataset",
            {"losses": [{"kind": "policy_gradient"}]},
            "policy_gradient, which learns from what the student writes, but source has student 0",
        ),
        (
            {"student": 1, "temperature": 0.7},
            {"losses": [{"kind": "policy_gradient"}]},
            "source has temperature 0.7, top_p 1 and min_new_tokens 0; leave them out",
        ),
        (
            "student",
            {"losses": [{"kind": "policy_gradient", "discount": 0.9}]},
            "discount of policy_gradient is 0.9, but credit token has none",
        ),
        (
            "student",
            {"mixture": {"policy": "doremi", "interval": 2, "lag_steps": 1}},
            "policy is doremi, which compares losses on the data set",
        ),
        ("student", {"baseline": True}, "baseline trains a copy on identical rows"),
        (
            "student",
            {"targets": {"teacher_free": True, "store": "store"}},
            "targets.teacher_free leaves no teacher",
        ),
    ],
)
def test_what_cannot_be_written_or_learnt_is_refused(source, options, said):
    with pytest.raises(ValidationError, match=said):
        config(source, **options)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ({"student": 0.1, "teacher": 0.2, "dataset": 0.7}, {}),
        ({"student": 1, "min_new_tokens": 8, "max_new_tokens": 8}, {}),
        ({"student": 1, "max_new_tokens": 511}, {}),
        ({"student": 1, "lag": 2}, {}),
        ({"student": 0.5, "dataset": 0.5}, {"mixture": {"policy": "doremi", "interval": 2}}),
        ({"student": 1, "updates": 2}, {}),
    ],
)
def test_what_is_just_possible_is_taken(source, options):
    for name, value in source.items():
        assert getattr(config(source, **options).source, name) == value


def test_a_share_that_moves_is_named_or_described():
    assert config("adaptive").source.adaptive == config({"adaptive": {}}).source.adaptive
    assert config("adaptive").source.writes
    source = config({"adaptive": {"start": 0.5}}).source
    assert (source.adaptive.start, source.first_share, source.dataset) == (0.5, 0.5, 1)
    assert Config.model_validate(config("adaptive").model_dump(mode="json")) == config("adaptive")


def test_hard_labels_are_learnt_beside_a_share_that_begins_below_all():
    losses = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]
    assert config({"adaptive": {"start": 0.9}}, losses=losses).source.adaptive.start == 0.9


@pytest.mark.parametrize(
    "losses", [[{"kind": "cross_entropy"}], [{"kind": "jsd"}, {"kind": "cross_entropy"}]]
)
def test_hard_labels_may_be_learnt_from_what_the_teacher_writes(losses):
    assert config("teacher", losses=losses).source.teacher == 1
    assert not config("teacher", losses=losses).source.writes
