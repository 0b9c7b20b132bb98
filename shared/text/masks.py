"""What rows and messages say of their own loss, under the names that are in use."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from shared.errors import DataError
from shared.text.nested import CALLS, calls_nothing

LEARNT_KEYS = (
    *("weight", "train", "training", "trainable", "is_trainable", "train_on_turn"),
    *("loss", "loss_mask", "loss_weight", "loss_scale", "learn", "compute_loss", "calculate_loss"),
    *("is_train", "should_train", "include_in_loss", "supervised", "is_supervised", "supervise"),
)
MASKED_KEYS = (
    *("masked", "is_masked", "ignore", "no_loss", "ignore_loss", "skip_loss"),
    *("unsupervised", "exclude_from_loss", "exclude_from_training", "no_train"),
)
UNCLEAR_KEYS = ("mask", "train_detail", "training_detail")  # of parts, or of either meaning
UNSET_KEYS = ("skip", "exclude")  # clear where they are not set
# Of an answer that goes on elsewhere, each with the value that says so.
UNFINISHED = {
    **dict.fromkeys(("prefix", "is_prefix", "partial", "is_partial"), True),
    **dict.fromkeys(("unfinished", "incomplete"), True),
    "end_turn": False,
}
CLEAR = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
ALL_MASKS = frozenset((*LEARNT_KEYS, *MASKED_KEYS, *UNCLEAR_KEYS, *UNSET_KEYS))
# Of a whole row: what says clearly that nothing of it is learnt.
ROW_LEARNT = frozenset(LEARNT_KEYS) - {"train_on_turn"}
ROW_MASKED = (frozenset(MASKED_KEYS) - {"masked", "is_masked", "unsupervised"}) | {*UNSET_KEYS}
ROW_MASKS = ROW_LEARNT | ROW_MASKED
IN_WORDS = frozenset(("loss", "loss_mask", "ignore", *UNSET_KEYS))  # a number counts or measures
# Words of which other names of a message's fields are made, as `computeLoss` and `no_backprop`.
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
LEARNING = re.compile("(un)?(loss|train|learn|supervis|backprop|gradient)(e|ed|t|ing|able|ion|s)?")
ASKING = frozenset(
    (
        *("is", "has", "do", "should", "use", "apply", "compute", "calc", "calculate", "include"),
        *("with", "for", "on", "keep", "enable"),
    )
)
DENYING = frozenset(
    (
        *("no", "not", "non", "dont", "never", "without", "skip", "skipped", "ignore", "ignored"),
        *("exclude", "excluded", "omit", "mask", "masked", "disable", "stop", "freeze", "frozen"),
    )
)


def message_is_learnt(more: dict[str, Any], role: str, where: str, name: str) -> bool | None:
    """What a message says of its own loss, taken out of `more`; None where it says nothing, or an
    assistant's that it is learnt."""
    told = set()
    for key in [key for key in more if _is_mask(key, more[key])]:
        value, known = more.pop(key), _snake(key)
        if known in UNSET_KEYS and not value:
            continue
        if known in (*UNCLEAR_KEYS, *UNSET_KEYS) or value not in (0, 1):
            raise DataError(
                f"{where}: {name} has {key}: {value!r:.40}, which says not clearly whether it is "
                "learnt; write train: true or train: false"
            )
        told.add(bool(value) != _denies(key))
    if len(told) > 1:
        raise DataError(f"{where}: {name} says both that it is learnt and that it is not")
    learnt = told.pop() if told else None
    return None if learnt and role == "assistant" else learnt


def row_is_learnt(name: object, value: object) -> bool | None:
    """What a field of a row says of the loss of the whole; None where it says nothing clearly."""
    if name not in ROW_MASKS:
        return None
    told = str(value).lower()  # a table holds text
    said = None if name in IN_WORDS and told not in ("true", "false") else CLEAR.get(told)
    return said if said is None else said != (name in ROW_MASKED)


def row_is_left_out(row: object, columns: Iterable[str]) -> bool:
    """Whether a row says that nothing of it is learnt, in a field that is none of `columns`."""
    others = row.items() if isinstance(row, Mapping) else ()
    return any(row_is_learnt(n, value) is False for n, value in others if n not in columns)


def is_unfinished(turn: Mapping[str, Any]) -> bool:
    """Whether an assistant's message says that its answer goes on, so that its end is no end; one
    with a call ends with it, whoever's turn it still is."""
    said = [says_unfinished(key, value) for key, value in turn.items()]
    calls = any(key in turn and not calls_nothing(turn[key]) for key in CALLS)
    return turn.get("role") == "assistant" and True in said and not calls


def says_unfinished(key: str, value: object) -> bool | None:
    """What a message's field says of whether its answer goes on; None where it says nothing."""
    said, name = CLEAR.get(str(value).lower()), _snake(key)
    return said == UNFINISHED[name] if said is not None and name in UNFINISHED else None


def _is_mask(key: str, value: object) -> bool:
    """Whether a message's field is about its loss: of a known name, or of one made of such words
    where it is yes or no."""
    if _snake(key) in ALL_MASKS:
        return True
    words = _words(key)
    is_asked = value in (0, 1) and bool((ASKING | DENYING) & set(words))  # a count is no mask
    is_told = isinstance(value, bool) or str(value).lower() in ("true", "false") or is_asked
    return is_told and any(map(LEARNING.fullmatch, words))


def _denies(key: str) -> bool:
    """Whether a field that is set says that its message is not learnt."""
    if (name := _snake(key)) in ALL_MASKS:
        return name in MASKED_KEYS
    return any(
        word in DENYING or (word.startswith("un") and LEARNING.fullmatch(word))
        for word in _words(key)
    )


def _snake(key: str) -> str:
    return "_".join(_words(key))


def _words(key: str) -> list[str]:
    """The words of a name; none where it counts, as `loss_2`."""
    return [] if any(map(str.isdigit, key)) else [word.lower() for word in WORDS.findall(key)]
