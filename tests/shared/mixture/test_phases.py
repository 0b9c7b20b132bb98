"""When a phase ends, whatever the gaps do, and which phases can be at all."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from shared.config.progressive import Progressive
from shared.config.run import Config
from shared.mixture.phases import earliest_phases, next_phase
from shared.mixture.weight_log import WeightEntry
from tests.shared.config.test_run import config

LAG = 2


def _decided(
    progressive: Progressive, gaps: list[float | None], *, interval: int = 10, lag: int = LAG
) -> list[WeightEntry]:
    """The entries of a run whose gap at decision i is `gaps[i]`."""
    entries = [WeightEntry(0, 0, 0, (1.0,), gap=gaps[0])]
    for index, gap in enumerate(gaps[1:], start=1):
        place = {"decided_at": interval * index, "effective_from": interval * index + lag}
        phase = next_phase(entries, progressive, **place, gap=gap)
        entries.append(WeightEntry(index, **place, weights=(1.0,), phase=phase, gap=gap))
    return entries


def _phases(progressive: Progressive, gaps: list[float | None], **place: int) -> list[int]:
    return [entry.phase for entry in _decided(progressive, gaps, **place)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lag", [0, 2, 10])
def test_phases_begin_at_0_and_rise_by_one_up_to_the_last(seed: int, lag: int) -> None:
    rng = np.random.default_rng(seed)
    progressive = Progressive(
        phases=int(rng.integers(2, 6)),
        max_steps=int(rng.integers(1, 200)) if rng.random() < 0.5 else None,
        plateau=float(rng.uniform(0, 0.1)),
        patience=int(rng.integers(1, 4)),
    )
    gaps = [None if rng.random() < 0.1 else float(rng.uniform(-0.1, 1)) for _ in range(60)]
    phases = _phases(progressive, gaps, lag=lag)
    assert phases[0] == 0
    assert set(np.diff(phases)) <= {0, 1}
    assert max(phases) < progressive.phases
    again = _decided(progressive, gaps[:30], lag=lag)
    assert [entry.phase for entry in again] == phases[:30]


def test_a_phase_lasts_max_steps_up_to_the_next_decision() -> None:
    progressive = Progressive(max_steps=20, plateau=None)
    entries = _decided(progressive, [None] * 9)
    begun = [next(e.effective_from for e in entries if e.phase == phase) for phase in range(3)]
    assert begun == [0, 22, 42]
    assert _phases(Progressive(max_steps=23, plateau=None), [None] * 9)[3] == 1


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_phase_ends_once_the_gap_falls_by_less_than_plateau_over_patience(patience: int) -> None:
    progressive = Progressive(plateau=0.1, patience=patience)
    falling = [0.9 ** (i * 1.01 / patience) for i in range(12)]
    assert _phases(progressive, falling) == [0] * 12
    slow = [0.9 ** (i * 0.99 / patience) for i in range(12)]
    expected = [0] * patience + [1] * patience + [2] * 12
    assert _phases(progressive, slow) == expected[:12]


def test_gaps_of_the_phase_before_count_only_as_its_start() -> None:
    """The gap falls fast again as soon as a phase has begun: the phase lasts."""
    progressive = Progressive(plateau=0.1, patience=2)
    gaps = [1.0, 1.0, 1.0, 0.8, 0.64, 0.63, 0.62]
    assert _phases(progressive, gaps) == [0, 0, 1, 1, 1, 1, 2]


def test_without_a_gap_at_step_0_a_phase_ends_one_decision_later() -> None:
    progressive = Progressive(plateau=0.1, patience=2)
    assert _phases(progressive, [1.0] * 6) == [0, 0, 1, 1, 2, 2]
    assert _phases(progressive, [None, *[1.0] * 5]) == [0, 0, 0, 1, 1, 2]


def test_a_student_that_is_level_with_its_teacher_goes_on() -> None:
    progressive = Progressive(plateau=0.1, patience=1)
    assert _phases(progressive, [0.0, -0.1, -0.2]) == [0, 1, 2]


@pytest.mark.parametrize("opens_with_gap", [True, False])
def test_the_earliest_phases_are_those_of_a_gap_that_never_falls(opens_with_gap: bool) -> None:
    for fields in ({"max_steps": 35, "plateau": None}, {"patience": 3}, {"max_steps": 20}):
        progressive = Progressive(phases=4, **fields)
        gaps = [1.0 if opens_with_gap else None, *[1.0] * 29]
        entries = _decided(progressive, gaps)
        begun = [next(e.effective_from for e in entries if e.phase == phase) for phase in range(4)]
        found = earliest_phases(
            progressive, range(0, 300, 10), lag=LAG, opens_with_gap=opens_with_gap
        )
        assert found == begun


def _refused(match: str, **parts: Any) -> None:
    with pytest.raises(ValidationError, match=match):
        config(**{"steps": 300, **parts})


def test_phases_that_never_end_are_refused() -> None:
    _refused("neither max_steps nor plateau", progressive={"plateau": None})


def test_a_last_phase_that_cannot_begin_is_refused() -> None:
    long = {"max_steps": 150, "plateau": None}
    _refused(r"phases is 3, but phase 3 cannot begin within 300 steps", progressive=long)
    _refused(r"phase 2 cannot begin within 300 steps", progressive=long | {"max_steps": 300})
    _refused(r"phase 3 cannot begin", progressive={"patience": 20})
    ddk = {"policy": "ddk"}
    _refused(r"phase 2 cannot .*, decided every 1000 steps", progressive={}, mixture=ddk)
    kept: Config = config(steps=300, progressive=long | {"max_steps": 140})
    assert kept.progressive is not None


def test_a_second_interval_is_refused() -> None:
    ddk = {"policy": "ddk", "interval": 10}
    match = r"progressive.interval is 20, but .* mixture.interval 10 steps; remove"
    _refused(match, progressive={"interval": 20}, mixture=ddk)


def test_an_interval_below_the_lag_is_refused() -> None:
    _refused(r"progressive.interval is 1, below the lag of 2", progressive={"interval": 1})


@pytest.mark.parametrize(
    ("option", "value"),
    [("phases", 1), ("replay", 1.0), ("replay", -0.1), ("patience", 0), ("plateau", 1.0)],
)
def test_numbers_without_sense_are_refused(option: str, value: float) -> None:
    _refused(option, progressive={option: value})


def test_a_final_weight_needs_phases() -> None:
    hidden = {"kind": "hidden_states", "layers": {1: 1}, "final_weight": 0.0}
    _refused("final_weight, .* but progressive is not set", losses=[hidden])


def test_a_stop_ratio_below_one_is_refused() -> None:
    _refused("stop_ratio", mixture={"policy": "ddk", "interval": 10, "stop_ratio": 0.9})


def test_hidden_states_go_on_a_line_from_their_weight_to_the_final_one() -> None:
    hidden = {"kind": "hidden_states", "layers": {1: 1}, "weight": 1.0, "final_weight": 0.1}
    annealed = config(
        steps=1000, progressive={"phases": 4}, losses=[{"kind": "forward_kl"}, hidden]
    )
    weights = [annealed.losses_in(phase)[1].weight for phase in range(4)]
    assert weights == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert [annealed.losses_in(phase)[0].weight for phase in range(4)] == [1.0] * 4
    constant = config(losses=[{"kind": "hidden_states", "layers": {1: 1}}])
    assert constant.losses_in(0) == constant.losses
