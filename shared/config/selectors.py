"""Which ids the teacher ships: what a config's `targets.selector` may be, and what `auto` picks.

`top_k` ships the most likely ids and the exact mass of all others; `renormalised` leaves that mass
out, which is biased. `threshold` and `sampled` draw ids by the teacher's probabilities, which is
unbiased, for divergences that are linear in p and at one temperature. Beside the most likely ids
the teacher may answer about some that the student names, for losses that weigh ids by the student.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from shared.config.losses import KINDS, Loss

Selector = Literal["top_k", "renormalised", "threshold", "sampled"]
DRAWN: tuple[Selector, ...] = ("threshold", "sampled")


def chosen(
    selector: Selector | Literal["auto"],
    losses: Sequence[Loss],
    *,
    keeps_all: bool,
    draws: bool = True,
) -> Selector:
    """The selector itself, or what `auto` stands for: `threshold` where every teacher `draws` ids,
    every loss that reads ids takes drawn ones, all at one temperature, and some ids are not kept,
    else `top_k`."""
    if selector != "auto":
        return selector
    if keeps_all or not draws:
        return "top_k"
    takes_drawn_ids = all(loss.takes_drawn_ids for loss in _read_ids(losses))
    return "threshold" if takes_drawn_ids and len(_temperatures(losses)) == 1 else "top_k"


def check_selector(selector: Selector | Literal["auto"], losses: Sequence[Loss]) -> None:
    """Raise ValueError where a selector that draws cannot serve a loss."""
    if selector not in DRAWN:
        return
    for loss in _read_ids(losses):
        if not loss.takes_drawn_ids:
            raise ValueError(
                f"targets.selector is {selector}, which draws ids, but the loss {loss.kind} "
                "compares both distributions at the same ids; take targets.selector=top_k, or "
                f"{_either(kind for kind, section in KINDS.items() if section.takes_drawn_ids)}"
            )
    temperatures = _temperatures(losses)
    if len(temperatures) > 1:
        named = " and ".join(f"{temperature:g}" for temperature in temperatures)
        raise ValueError(
            f"targets.selector is {selector}, which draws ids at one temperature, but losses have "
            f"{named}; give them the same, or take targets.selector=top_k"
        )


def check_student_ids(
    student_ids: int, selector: Selector | Literal["auto"], losses: Sequence[Loss]
) -> None:
    """Raise ValueError where the student names ids that no answer could hold or no loss reads."""
    if not student_ids:
        return
    if selector not in ("auto", "top_k"):
        raise ValueError(
            f"targets.student_ids is {student_ids}, which needs targets.selector top_k, not "
            f"{selector}; take top_k or auto, or leave student_ids out"
        )
    if not any(loss.weighs_by_student for loss in losses):
        kinds = " and ".join(dict.fromkeys(loss.kind for loss in losses))
        raise ValueError(
            f"targets.student_ids is {student_ids}, but no loss weighs ids by the student's "
            f"probability, with {kinds} alone; leave it out, or take {_student_weighted()}"
        )


def student_ids_note(student_ids: int) -> str:
    """A sentence for the start of a run whose student names ids."""
    return (
        f"targets.student_ids {student_ids}: the student reads every row once more to name ids, "
        "and no step is asked ahead, so that training waits for the teacher at the start of every "
        f"step; {4 * student_ids} bytes a token go to the teacher"
    )


def selector_note(
    selector: Selector | Literal["auto"],
    picked: Selector,
    losses: Sequence[Loss],
    top_k: int,
    *,
    student_ids: int = 0,
) -> str:
    """A sentence for the start of a run; `picked` is what the selector stands for."""
    others = f"the {student_ids} likeliest ids of the student, " if student_ids else ""
    likeliest = f"{others}the {top_k} most likely {'others' if others else 'ids'}"
    kept = {
        "top_k": f"{likeliest} and the exact mass of {'the rest' if others else 'all others'}",
        "renormalised": f"the {top_k} most likely ids as if there were no others; this biases the "
        "student towards them and is for comparison, top_k or threshold are not",
        "threshold": f"{top_k} ids, the most likely exactly and the rest drawn by probability",
        "sampled": f"{top_k} draws by probability, with replacement",
    }
    if selector != "auto":
        return f"{picked}: {kept[picked]}"
    kinds = " and ".join(dict.fromkeys(loss.kind for loss in _read_ids(losses)))
    return f"targets.selector auto picks {picked}{kinds and f' for {kinds}'}: {kept[picked]}"


def _read_ids(losses: Sequence[Loss]) -> list[Loss]:
    return [loss for loss in losses if loss.reads_ids]


def _student_weighted() -> str:
    """The losses that weigh ids by the student, with what each needs for it."""
    conditions = {kind: section.student_weighted for kind, section in KINDS.items()}
    return _either(
        f"{kind} with {condition}" if condition else kind
        for kind, condition in conditions.items()
        if condition is not None
    )


def _either(names: Iterable[str]) -> str:
    """a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _temperatures(losses: Sequence[Loss]) -> list[float]:
    """Those of the divergences, each once, ascending."""
    return sorted({temperature for loss in losses for temperature in loss.temperatures})
