"""What checkpoints keep of a run's stateful parts, under which names, and what is refused."""

import json
from collections.abc import Mapping

import numpy as np
import pytest

from shared.config.losses import TAID
from shared.errors import CheckpointError
from student_trainer.metrics.accumulator import MetricsAccumulator, ReportAccumulator
from student_trainer.metrics.sums import LISTED, TOTALS, SumLayout
from student_trainer.ranks import Ranks
from student_trainer.sources.batches import Step
from student_trainer.state.stateful import (
    Stateful,
    refuse_other_states,
    restore_states,
    states_of,
)
from student_trainer.weighing.taid import TAIDState

LAYOUT = SumLayout(losses=("taid", "jsd"), reports=(), num_domains=2)
NUM_LISTED = len(TOTALS) + 2 + 2 * len(LISTED)
# `state.json` of a run on two domains with two losses, as format 3 has had it with sums in a list.
FORMAT_3 = {
    "step": 8,
    "weight_entries": 1,
    "interval": {
        "sums": [0.1 + n for n in range(NUM_LISTED)],
        "tokens_D": [120, 3],
        "rows_D": [5, 1],
        "machine": [0.5, 0.1, 4.0, 1024.0, 0.0, 2.0],
    },
    "since_report": {
        "sums": [[0.3, 1e-17]] + [[0.0, 2.5]] * (len(LISTED) - 1),
        "tokens_D": [7, 9],
    },
    "interpolation": {"teacher_share": 0.45, "momentum": -0.01, "last_loss": 2.25},
    "facts": {"checkpoint format": 3},
    "frozen_weights": None,
}


def parts_of_a_run(ranks: Ranks) -> dict[str, Stateful]:
    return {
        "interval": MetricsAccumulator(ranks, LAYOUT),
        "since_report": ReportAccumulator(LAYOUT),
        "interpolation": TAIDState.start(TAID()),
    }


def test_a_checkpoint_of_format_3_is_read_to_the_bit(ranks: Ranks) -> None:
    found = json.loads(json.dumps(FORMAT_3))
    parts = parts_of_a_run(ranks)
    refuse_other_states("step-000008", found=found, parts=parts)
    restore_states(parts, found)
    metrics, learnt, taid = parts.values()
    assert isinstance(metrics, MetricsAccumulator)
    assert metrics.by_domain("kl").tolist() == FORMAT_3["interval"]["sums"][5:7]
    assert metrics.tokens_D.tolist() == [120, 3]
    assert metrics.rows_D.tolist() == [5, 1]
    assert metrics.machine.tolist() == [*FORMAT_3["interval"]["machine"], 0, 0]  # of no parts
    assert isinstance(learnt, ReportAccumulator)
    assert learnt.by_domain("kl").tolist() == [0.3, 1e-17]
    assert learnt.tokens_D.tolist() == [7, 9]
    assert taid == TAIDState(0.45, -0.01, 2.25)
    written = json.loads(json.dumps(states_of(parts)))
    again = parts_of_a_run(ranks)
    restore_states(again, written)
    assert states_of(again) == states_of(parts) == written
    assert written["interval"]["sums"]["excess"] == FORMAT_3["interval"]["sums"][7:9]


def test_what_is_restored_goes_on_as_what_was_kept(ranks: Ranks) -> None:
    straight, resumed = (parts_of_a_run(ranks) for _ in range(2))
    for index in range(3):
        if index == 2:
            restore_states(resumed, json.loads(json.dumps(states_of(straight))))
        for parts in (straight, resumed)[: 1 + (index == 2)]:
            learn(parts, index)
    assert states_of(resumed) == states_of(straight)
    cleared = parts_of_a_run(ranks)
    for name in ("interval", "since_report"):
        straight[name].clear()  # type: ignore[attr-defined]
        assert straight[name].state() == cleared[name].state()


def learn(parts: Mapping[str, Stateful], index: int) -> None:
    """Count a step in, as the loop does."""
    sums = np.random.default_rng(index).random(LAYOUT.size)
    step = Step(index, (), np.array([10, index]), np.array([2, 1]))
    metrics, learnt, taid = parts.values()
    assert isinstance(metrics, MetricsAccumulator)
    assert isinstance(learnt, ReportAccumulator)
    assert isinstance(taid, TAIDState)
    metrics.add(step, sums, np.arange(8.0))
    learnt.add(step, sums)
    taid.follow(float(sums[0]), TAID(), step=index, steps=9)


@pytest.mark.parametrize("name", ["interval", "interpolation"])
def test_a_checkpoint_without_the_state_of_a_part_is_refused(ranks: Ranks, name: str) -> None:
    found = {key: value for key, value in FORMAT_3.items() if key != name}
    sentence = f"step-000008 holds no state named {name}, which this run goes on from; .*--fresh"
    with pytest.raises(CheckpointError, match=sentence):
        refuse_other_states("step-000008", found=found, parts=parts_of_a_run(ranks))


def test_a_checkpoint_with_a_state_that_no_part_takes_up_is_refused(ranks: Ranks) -> None:
    found = FORMAT_3 | {"buffer": {"rows": []}}
    sentence = "step-000008 holds a state named buffer, which nothing in this run takes up; .*--fre"
    with pytest.raises(CheckpointError, match=sentence):
        refuse_other_states("step-000008", found=found, parts=parts_of_a_run(ranks))
