"""What rows and messages say of their own loss, under the names that are in use."""

from typing import Any

from shared.errors import DataError

LEARNT_KEYS = (
    *("weight", "train", "training", "trainable", "is_trainable", "train_on_turn"),
    *("loss", "loss_mask", "loss_weight", "loss_scale", "learn", "compute_loss", "calculate_loss"),
    *("is_train", "should_train", "include_in_loss"),
)
MASKED_KEYS = ("masked", "is_masked", "ignore", "no_loss", "ignore_loss", "skip_loss")
UNCLEAR_KEYS = ("mask", "train_detail", "training_detail")  # of parts, or of either meaning
UNSET_KEYS = ("skip", "exclude")  # clear where they are not set
ALL_MASKS = frozenset((*LEARNT_KEYS, *MASKED_KEYS, *UNCLEAR_KEYS, *UNSET_KEYS))
# Of a whole row: what says clearly that nothing of it is learnt. `loss` may be a measured one.
ROW_LEARNT = frozenset(LEARNT_KEYS) - {"loss", "loss_mask", "train_on_turn"}
ROW_MASKED = frozenset(("no_loss", "ignore_loss", "skip_loss"))
ROW_MASKS = ROW_LEARNT | ROW_MASKED


def message_is_learnt(more: dict[str, Any], role: str, where: str, name: str) -> bool | None:
    """What a message says of its own loss, taken out of `more`; None where it says nothing, or an
    assistant's that it is learnt."""
    told = set()
    for key in [key for key in more if key in ALL_MASKS]:
        value = more.pop(key)
        if key in UNSET_KEYS and not value:
            continue
        if key in (*UNCLEAR_KEYS, *UNSET_KEYS) or value not in (0, 1):
            raise DataError(
                f"{where}: {name} has {key}: {value!r:.40}, which says not clearly whether it is "
                "learnt; write train: true or train: false"
            )
        told.add(bool(value) != (key in MASKED_KEYS))
    if len(told) > 1:
        raise DataError(f"{where}: {name} says both that it is learnt and that it is not")
    learnt = told.pop() if told else None
    return None if learnt and role == "assistant" else learnt


def row_is_learnt(name: object, value: object) -> bool | None:
    """What a field of a row says of the loss of the whole; None where it says nothing clearly."""
    if name not in ROW_MASKS:
        return None
    known = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    said = known.get(str(value).lower())  # a table holds text
    return said if said is None else said != (name in ROW_MASKED)
