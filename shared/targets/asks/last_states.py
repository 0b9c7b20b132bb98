"""Answers that hold the teacher's last hidden state in place of ids.

N positions with loss   E teacher width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from shared.targets.asks.ask import MASSES, Arrays, Ask
from shared.targets.asks.head_location import StatesEncoding
from shared.targets.codec.columns import STATE_TYPES, Column, Columns


@dataclass(frozen=True, slots=True)
class LastStates(Ask):
    """The teacher's last hidden state, the input of its LM head, from which the student's worker
    makes all log-probabilities."""

    shared_vocab: int
    head: str  # digest of the LM head
    states: StatesEncoding  # the teacher's own type
    width: int  # E

    selector: ClassVar = "last_hidden"
    holds: ClassVar = ("last hidden state", MASSES)

    def columns(self) -> dict[str, Column]:
        """See `Ask`."""
        type_ = pa.list_(STATE_TYPES[self.states], self.width)
        return {"last_hidden": Column(type_, "last hidden state")}

    def decode(self, columns: Columns) -> Arrays:
        """`teacher_last_NE` in the teacher's own type, bfloat16 as uint16 bits."""
        return {"teacher_last_NE": columns.matrix("last_hidden")}

    def captured_mass(self, arrays: Arrays) -> np.ndarray:
        """All of it [N]."""
        return np.ones(len(arrays["teacher_last_NE"]))

    def mass_in_words(self, mass: float) -> str:
        """See `Ask`."""
        return f"the last state and a head hold {mass:.1%} of the mass"

    def in_words(self) -> str:
        """See `Ask`."""
        return f"last hidden states in {self.states} before the head {self.head[:8]}"

    def stored(self) -> dict[str, Any]:
        """See `Ask`; it is told by its head, not by a selector."""
        return {
            "shared_vocab": self.shared_vocab,
            "head": self.head,
            "states": self.states,
            "states_width": self.width,
        }

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any]) -> "LastStates":
        """See `Ask`."""
        named = {name: fields[name] for name in ("shared_vocab", "head", "states")}
        return cls(**named, width=fields["states_width"])
