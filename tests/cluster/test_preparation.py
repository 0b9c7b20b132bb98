"""What a command says of a config before anything starts."""

import pytest

from cluster.preparation import idle_policy_note
from shared.config_file import load_config
from tests.cluster.jobs import write_job


@pytest.mark.parametrize(
    ("steps", "mixture", "idle"),
    [
        (6, {"policy": "ddk", "interval": 2, "lag_steps": 1}, False),
        (4, {"policy": "ddk", "interval": 2, "lag_steps": 1}, False),
        (3, {"policy": "ddk", "interval": 2, "lag_steps": 1}, True),
        (300, {"policy": "ddk"}, True),
        (6, {"policy": "fixed"}, False),
    ],
)
def test_a_policy_that_cannot_act_within_the_run_is_said(tmp_path, tiny_pair, steps, mixture, idle):
    config = load_config(write_job(tmp_path, tiny_pair, steps=steps, mixture=mixture))
    note = idle_policy_note(config)
    assert (note is not None) == idle
    if note:
        assert f"the run has {steps}" in note
        assert "lower mixture.interval" in note
