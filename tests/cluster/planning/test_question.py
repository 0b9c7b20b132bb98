"""What is asked of the teacher, in training and for an evaluation, is what the config says."""

from typing import Any

import pytest

from cluster.planning.handshake import (
    refuse_beyond_vllm,
    training_question,
    validation_question,
)
from shared.config.run import Config
from shared.errors import ConfigError
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.question import HiddenAsk, Question


def config(**parts: Any) -> Config:
    fields = {
        "name": "a",
        "steps": 1,
        "teachers": {"t": {"model": "a"}},
        "student": {"model": "b"},
        "domains": {"math": {"train": "m"}},
        **parts,
    }
    return Config.model_validate(fields)


def test_what_is_asked_is_what_the_config_says():
    targets = {"selector": "top_k", "top_k": 7, "encoding": "int8", "ids": "plain"}
    losses = [
        {"kind": "reverse_kl", "temperature": 3.0},
        {"kind": "hidden_states", "layers": {2: 1}},
    ]
    targets["hidden"] = {"encoding": "int8"}
    found = training_question(
        config(targets=targets, losses=losses), 512, projection="p", prompts="q"
    )
    assert found is not None
    ask = LikeliestIds(7, 512, temperatures=(1.0, 3.0), encoding="int8")
    assert found == Question(ask, hidden=HiddenAsk((2,), "int8", "p"), prefix="q")
    assert found.as_dict()["ids"] == "plain"


def test_what_a_student_names_is_asked_beside_the_likeliest():
    targets = {"top_k": 7, "student_ids": 5}
    found = training_question(config(targets=targets, losses=[{"kind": "reverse_kl"}]), 512)
    assert found is not None
    assert found.ask == LikeliestIds(12, 512, student_ids=5)


@pytest.mark.parametrize("selector", ["sampled", "threshold"])
def test_the_seed_of_draws_is_part_of_the_question(selector):
    losses = [{"kind": "forward_kl", "temperature": 2.0}]
    targets = {"selector": selector, "seed": 5}
    found = training_question(config(losses=losses, targets=targets), 512)
    assert found is not None
    assert (found.ask.selector, found.ask.seed, found.ask.temperature) == (selector, 5, 2.0)
    assert found.ask.with_entropy
    other = training_question(config(losses=losses, targets=targets | {"seed": 6}), 512)
    assert other is not None
    assert found.identity() != other.identity()


def test_the_likeliest_ids_are_the_same_question_whatever_the_seed():
    found = training_question(config(targets={"selector": "top_k", "seed": 5}), 512)
    assert found == training_question(config(targets={"selector": "top_k"}), 512)


@pytest.mark.parametrize(
    ("kl", "vocabulary", "top_k", "kind"),
    [
        ("auto", 512, 512, "full"),
        ("auto", 50_000, 9, "bucketed-9"),
        ("bucketed", 512, 9, "bucketed-9"),
        ("full", 50_000, 50_000, "full"),
    ],
)
def test_an_evaluation_is_over_what_the_config_says(kl, vocabulary, top_k, kind):
    """At temperature 1, whatever the losses' temperature."""
    asked = config(
        evaluation={"kl": kl},
        targets={"top_k": 9},
        losses=[{"kind": "forward_kl", "temperature": 4.0}],
    )
    spec, found = validation_question(asked, vocabulary, prompts="", head=None)
    assert spec == Question(LikeliestIds(top_k, vocabulary, encoding="fp32"))
    assert found == kind


VLLM = {"model": "a", "engine": "vllm", "python": "/usr/bin/python"}


@pytest.mark.parametrize(
    ("kl", "top_k", "vocabulary", "said"),
    [
        ("full", 64, 32_769, r"evaluation\.kl is full, all 32,769 ids, .*set evaluation\.kl=auto"),
        ("auto", 32_769, 50_000, r"targets\.top_k is 32,769, .*at most 32,768 ids of a position"),
        ("full", 64, 32_768, None),
        ("auto", 32_768, 50_000, None),
        ("bucketed", 64, 50_000, None),
    ],
)
def test_vllm_is_not_asked_for_more_ids_than_it_can_tell_of(kl, top_k, vocabulary, said):
    asked = {"evaluation": {"kl": kl}, "targets": {"top_k": top_k, "selector": "top_k"}}
    refuse_beyond_vllm(config(**asked), vocabulary)  # of transformers anything
    of_vllm = config(teachers={"t": VLLM}, **asked)
    if said is None:
        refuse_beyond_vllm(of_vllm, vocabulary)
        return
    with pytest.raises(ConfigError, match=said):
        refuse_beyond_vllm(of_vllm, vocabulary)
