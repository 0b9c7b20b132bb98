"""What a run keeps in checkpoints besides weights: its stateful parts, each under a name.

`state.json` holds the state of every part beside the facts of `FACTS`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from shared.errors import CheckpointError

FACTS = frozenset({"step", "weight_entries", "facts", "frozen_weights"})  # of the checkpoint itself


class Stateful(Protocol):
    """A part of a run whose state survives a restart."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON takes it; floats survive exactly. All ranks call it
        together, rank 0 writes."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was written from, on every rank."""
        ...


def states_of(parts: Mapping[str, Stateful]) -> dict[str, dict[str, Any]]:
    """The state of every part by its name; all ranks together."""
    assert not FACTS & parts.keys(), "a part's name is none of the checkpoint's own"
    return {name: part.state() for name, part in parts.items()}


def refuse_other_states(
    checkpoint: str, *, found: Mapping[str, Any], parts: Mapping[str, Stateful]
) -> None:
    """Raise CheckpointError where `found`, a checkpoint's `state.json`, lacks the state of a part
    of this run, or holds one that no part takes up."""
    way_out = (
        "resume it with the config and the version of Tutelage that wrote it, or start over with "
        "--fresh"
    )
    for name in parts:
        if name not in found:
            raise CheckpointError(
                f"{checkpoint} holds no state named {name}, which this run goes on from; {way_out}"
            )
    for name in found:
        if name not in parts and name not in FACTS:
            raise CheckpointError(
                f"{checkpoint} holds a state named {name}, which nothing in this run takes up; "
                f"{way_out}"
            )


def restore_states(parts: Mapping[str, Stateful], found: Mapping[str, Any]) -> None:
    """Restore every part from the `state.json` that `refuse_other_states` let pass."""
    for name, part in parts.items():
        part.restore(found[name])
