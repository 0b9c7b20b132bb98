"""What a run across tokenizers may have, and what is refused with a way out."""

from typing import Any

import pytest
from pydantic import ValidationError

from shared.config.run import Config

TEACHER = {"model": "teacher"}
TV = [{"kind": "total_variation", "weight": 2.0}]


def config(**options: Any) -> Config:
    fields = {
        "name": "across",
        "steps": 100,
        "teachers": {"t": TEACHER},
        "student": {"model": "student"},
        "domains": {"d": {"train": "d.jsonl"}},
        "cross_tokenizer": "aligned",
    }
    return Config.model_validate(fields | options)


def refused(**options: Any) -> str:
    with pytest.raises(ValidationError) as said:
        config(**options)
    return str(said.value)


@pytest.mark.parametrize(
    "losses",
    [
        [{"kind": "forward_kl"}],
        [{"kind": "jsd", "beta": 0.5}, {"kind": "cross_entropy"}],
        [{"kind": "taid"}],
        [{"kind": "forward_kl"}, {"kind": "router_balance"}],
    ],
)
def test_every_divergence_is_aligned_beside_losses_of_the_text(losses) -> None:
    assert config(losses=losses).selector_for(512) == "top_k"


def test_uld_is_total_variation_by_rank() -> None:
    assert config(cross_tokenizer="uld", losses=[*TV, {"kind": "cross_entropy"}]).losses
    said = refused(cross_tokenizer="uld")
    assert "losses has a forward_kl" in said
    assert "take {kind: total_variation, weight: 2}, or cross_tokenizer=grouped" in said


def test_groups_are_compared_at_temperature_1() -> None:
    losses = [{"kind": "reverse_kl", "temperature": 2.0}]
    said = refused(cross_tokenizer="grouped", losses=losses)
    assert "losses has a reverse_kl with temperature 2.0" in said
    assert "set temperature to 1, or cross_tokenizer=aligned" in said
    assert config(losses=losses).cross_tokenizer == "aligned"
    assert config(cross_tokenizer="grouped", losses=[{"kind": "reverse_kl"}]).losses


@pytest.mark.parametrize(
    "kind",
    [{"kind": "atkd"}, {"kind": "token_temperature"}, {"kind": "hidden_states", "layers": {1: 1}}],
)
def test_a_loss_at_the_same_tokens_is_refused(kind) -> None:
    said = refused(losses=[{"kind": "forward_kl"}, kind])
    assert f"losses has a {kind['kind']}, which needs both models at the same tokens" in said
    assert "take a divergence" in said


@pytest.mark.parametrize(
    ("options", "named", "way_out"),
    [
        (
            {
                "teachers": {"t": TEACHER, "u": TEACHER},
                "domains": {n: {"train": "d.jsonl", "teacher": n} for n in "tu"},
            },
            "teachers has 2",
            "keep one",
        ),
        ({"source": "student"}, "source has", "set source=dataset"),
        (
            {"targets": {"exact": "last_hidden"}},
            "targets.exact is last_hidden",
            "targets.exact out",
        ),
        (
            {"targets": {"student_ids": 4}, "losses": [{"kind": "reverse_kl"}]},
            "targets.student_ids is 4",
            "leave them out",
        ),
        ({"targets": {"selector": "threshold"}}, "targets.selector is threshold", "take top_k"),
        ({"targets": {"selector": "renormalised"}}, "selector is renormalised", "take top_k"),
        ({"weighting": {"policy": "llkd"}}, "weighting.policy llkd", "leave it out"),
        ({"prompts": "prompts.json"}, "prompts is prompts.json", "leave prompts out"),
        (
            {
                "domains": {"d": {"train": "d.jsonl", "columns": {"teacher_prompt": "hint"}}},
            },
            "columns has a teacher_prompt",
            "leave it out",
        ),
        (
            {"cross_tokenizer": "uld", "losses": TV, "mixture": {"policy": "odm"}},
            "mixture.policy odm",
            "take ddk",
        ),
        ({"mixture": {"policy": "doremi"}}, "mixture.policy doremi", "take ddk"),
        (
            {"progressive": {"difficulty": "gap"}},
            "progressive.difficulty is gap",
            "take teacher_nll",
        ),
        (
            {"teachers": {"t": TEACHER | {"online_modules": {}}}},
            "teachers.t.online_modules",
            "leave them out",
        ),
        (
            {
                "teachers": {"t": {"model": "student", "follow_student": {}}},
            },
            "teachers.t.follow_student",
            "leave it out",
        ),
    ],
)
def test_what_needs_one_tokenizer_is_refused_with_its_way_out(options, named, way_out) -> None:
    said = refused(**options)
    assert f"cross_tokenizer is {options.get('cross_tokenizer', 'aligned')}" in said
    assert named in said
    assert way_out in said
    assert "or leave cross_tokenizer out" in said
