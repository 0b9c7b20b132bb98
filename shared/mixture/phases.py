"""When a phase of progressive distillation ends: a pure rule over the decisions so far.

Progressive phases are named by AKD (Saxena, Janzen and Maass, WiML 2024); this rule is ours: a
phase ends when the student has stopped catching up with the teacher, or after a number of steps.
Phases count from 0. Gaps are nats per token of validation text.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shared.config.progressive import Progressive


class Decided(Protocol):
    """What the rule reads of a decision; a `shared.mixture.weight_log.WeightEntry` is one."""

    @property
    def decided_at(self) -> int:
        """Step."""
        ...

    @property
    def effective_from(self) -> int:
        """First block it rules."""
        ...

    @property
    def phase(self) -> int:
        """Phase it puts in force."""
        ...

    @property
    def gap(self) -> float | None:
        """How far the student was behind the teacher at `decided_at`, where that was measured."""
        ...


def next_phase(
    decided: Sequence[Decided],
    progressive: Progressive,
    *,
    decided_at: int,
    effective_from: int,
    gap: float | None,
) -> int:
    """The phase that the decision after `decided` puts in force: the same or the next."""
    phase = decided[-1].phase
    if phase == progressive.phases - 1:
        return phase
    own = [decision for decision in decided if decision.phase == phase]
    began = own[0].effective_from
    lasted = effective_from - began
    if progressive.max_steps is not None and lasted >= progressive.max_steps:
        return phase + 1
    measured = [(d.decided_at, d.gap) for d in own] + [(decided_at, gap)]
    return phase + _has_stalled(measured, progressive, began=began)


def _has_stalled(
    measured: Sequence[tuple[int, float | None]], progressive: Progressive, *, began: int
) -> bool:
    """Whether the gap fell by less than `plateau` of itself over the last `patience` decisions of
    the phase. The first one compares with the last gap measured before the phase began."""
    if progressive.plateau is None:
        return False
    known = [(step, gap) for step, gap in measured if gap is not None]
    before = [gap for step, gap in known if step <= began][-1:]
    gaps = before + [gap for step, gap in known if step > began]
    if len(gaps) <= progressive.patience:
        return False
    first, last = gaps[-1 - progressive.patience], gaps[-1]
    return first <= 0 or last > (1 - progressive.plateau) * first


class _Decision(NamedTuple):
    decided_at: int
    effective_from: int
    phase: int
    gap: float | None


def earliest_phases(
    progressive: Progressive, decision_steps: range, *, lag: int, opens_with_gap: bool
) -> list[int]:
    """First block of each phase that can begin, where no gap ever falls."""
    begun, recent = [_Decision(0, 0, 0, 1.0 if opens_with_gap else None)], []
    for step in decision_steps[1:]:
        if len(begun) == progressive.phases:
            break
        place = {"decided_at": step, "effective_from": step + lag, "gap": 1.0}
        phase = next_phase([begun[-1], *recent], progressive, **place)
        decision = _Decision(phase=phase, **place)
        if phase > begun[-1].phase:
            begun, recent = [*begun, decision], []
        else:
            recent = [*recent, decision][-1 - progressive.patience :]
    return [decision.effective_from for decision in begun]


def check_progressive(
    progressive: Progressive,
    decision_steps: range,
    *,
    steps: int,
    lag: int,
    mixture_interval: int | None,
    opens_with_gap: bool,
) -> None:
    """Raise ValueError where the phases cannot be as asked; `mixture_interval` is None for fixed
    weights."""
    if progressive.max_steps is None and progressive.plateau is None:
        raise ValueError(
            "progressive has neither max_steps nor plateau, so no phase would ever end; set one"
        )
    if mixture_interval is not None and progressive.interval is not None:
        raise ValueError(
            f"progressive.interval is {progressive.interval}, but phases are decided with the "
            f"weights, every mixture.interval {mixture_interval} steps; remove "
            "progressive.interval"
        )
    if progressive.interval is not None and progressive.interval < lag:
        raise ValueError(
            f"progressive.interval is {progressive.interval}, below the lag of {lag} steps from a "
            "decision to its effect; raise it"
        )
    begun = earliest_phases(progressive, decision_steps, lag=lag, opens_with_gap=opens_with_gap)
    if len(begun) < progressive.phases:
        raise ValueError(
            f"progressive.phases is {progressive.phases}, but phase {len(begun) + 1} cannot begin "
            f"within {steps} steps, decided every {decision_steps.step} steps: raise steps, or "
            "lower progressive.phases, max_steps, patience or the interval"
        )
