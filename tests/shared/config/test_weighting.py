"""Weightings that a config names: defaults of the papers, and what is refused."""

import pytest
from pydantic import ValidationError

from tests.shared.config.test_run import config

# What each needs beside itself.
POLICIES: dict[str, dict] = {
    "llkd": {},
    "instance_weights": {},
    "reinforced": {"augmentation": {"share": 0.5}},
}


def test_every_token_counts_alike_unless_a_policy_is_named():
    assert config().weighting.policy == "uniform"
    assert not config().weighting.weighs


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_without_a_teacher_to_weigh_by_is_refused(policy: str):
    assert config(weighting={"policy": policy}, **POLICIES[policy]).weighting.weighs
    with pytest.raises(ValidationError, match=f"weighting.policy is {policy}, which reads what"):
        config(weighting={"policy": policy}, losses=[{"kind": "cross_entropy"}])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_beside_a_policy_gradient_is_refused(policy: str):
    losses = [{"kind": "policy_gradient"}]
    assert config(losses=losses, source="student").source.writes
    with pytest.raises(ValidationError, match=f"is {policy}, but losses has a policy_gradient"):
        config(losses=losses, source="student", weighting={"policy": policy})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "llkd", "confidence": -1}, "confidence"),
        ({"policy": "llkd", "decay": 1.0}, "decay"),
        ({"policy": "llkd", "unit": "row"}, "unit"),
        ({"policy": "llkd", "steepness": 1.0}, "steepness"),
        ({"policy": "instance_weights", "centre": 0}, "centre"),
        ({"policy": "instance_weights", "centre": "mode"}, "centre"),
        ({"policy": "adakd"}, "policy"),
    ],
)
def test_an_option_that_a_policy_does_not_take_is_refused(options: dict, named: str):
    with pytest.raises(ValidationError, match=named):
        config(weighting=options)
