"""Named sums: where each stands, and what checkpoints keep of them."""

import json

import numpy as np
import torch

from student_trainer.metrics.accumulator import ReportAccumulator
from student_trainer.metrics.sums import SumLayout
from student_trainer.sources.batches import Step

LAYOUT = SumLayout(losses=("atkd", "jsd"), reports=("hard_share", "tkd"), num_domains=2)
SUMS = {
    "loss": [0.0],
    "captured_mass": [1.0],
    "unseen_mass": [2.0],
    "losses.atkd": [3.0],
    "losses.jsd": [4.0],
    "kl": [5.0, 6.0],
    "excess": [7.0, 8.0],
    "hard_share": [9.0, 10.0],
    "tkd": [11.0, 12.0],
}


def test_every_sum_is_read_where_it_was_put() -> None:
    tensors = {name: torch.tensor(value) for name, value in reversed(SUMS.items())}
    vector = LAYOUT.joined(tensors).numpy()
    assert vector.dtype == np.float64
    assert len(vector) == LAYOUT.size == 13
    for name, value in SUMS.items():
        assert vector[LAYOUT.place(name)].tolist() == value
    assert LAYOUT.losses_in(vector) == {"atkd": 3.0, "jsd": 4.0}
    assert LAYOUT.totals_in(vector) == {"loss": 0.0, "captured_mass": 1.0, "unseen_mass": 2.0}


def test_a_state_survives_json_bit_for_bit() -> None:
    vector = np.random.default_rng(0).normal(size=LAYOUT.size)
    state = json.loads(json.dumps(LAYOUT.state(vector)))
    assert (LAYOUT.from_state(state) == vector).all()


def test_what_a_state_does_not_have_is_0() -> None:
    """As of a loss or a report that a later version counts."""
    state = {name: value for name, value in SUMS.items() if name not in ("losses.jsd", "tkd")}
    vector = LAYOUT.from_state(state)
    assert vector.tolist() == [0, 1, 2, 3, 0, *range(5, 11), 0, 0]


def test_a_state_that_is_a_list_is_read() -> None:
    """It has all that any loss reported, by domain."""
    listed = [*range(5), *(10 * q + d for q in range(6) for d in range(2))]
    vector = LAYOUT.from_state([float(x) for x in listed])
    assert vector.tolist() == [0, 1, 2, 3, 4, 0, 1, 10, 11, 20, 21, 40, 41]
    plain = SumLayout(("jsd",), (), 2)
    found = plain.from_state([float(x) for x in listed[1:]])
    assert found.tolist() == [1, 2, 3, 4, 0, 1, 10, 11]


def test_what_was_learnt_since_a_report_is_kept_by_name() -> None:
    since = ReportAccumulator(LAYOUT)
    step = Step(0, (), np.array([3, 4]), np.array([1, 1]))
    for _ in range(2):
        since.add(step, np.arange(13.0))
    assert since.by_domain("kl").tolist() == [10, 12]
    assert since.by_domain("excess").tolist() == [14, 16]
    again = ReportAccumulator(LAYOUT)
    again.restore(json.loads(json.dumps(since.state())))
    assert again.state() == since.state()
    listed = {"sums": [[1.0, 2.0], [3.0, 4.0], *[[0.0, 0.0]] * 4], "tokens_D": [6, 8]}
    again.restore(listed)
    assert (again.by_domain("kl").tolist(), again.by_domain("excess").tolist()) == ([1, 2], [3, 4])
