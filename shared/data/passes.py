"""Which lines of a unit may share a forward pass of a model.

Most models give a line the same answer whatever stands beside it. Some do not: they choose how to
read positions once per pass, or let padding and neighbours in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Types of rotary embeddings that are chosen once per pass, from its largest position.
CHOSEN_PER_PASS = ("longrope", "su")


@dataclass(frozen=True, slots=True)
class Passes:
    """What a model's lines may share; the default is everything."""

    padded: bool = True  # lines of several lengths share a pass; else only equal ones, unpadded
    shared: bool = True  # else every line has a pass of its own
    # Lengths, ascending: documents longer than one are read otherwise than those up to it, so the
    # two never share a pass, nor a line.
    switches: tuple[int, ...] = ()

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Passes":
        """The inverse of `dataclasses.asdict`, through JSON too."""
        return Passes(**{**fields, "switches": tuple(fields["switches"])})

    def within(self, context: int) -> "Passes":
        """The same of rows of up to so many tokens."""
        return replace(self, switches=tuple(n for n in self.switches if n < context))

    def side(self, length: int) -> int:
        """How many switches a document has passed."""
        return int(np.searchsorted(self.switches, length))

    def group(self, lengths: Sequence[int], longest: Sequence[int]) -> np.ndarray:
        """The pass of each line, from 0 without a gap; `longest` is its longest document."""
        if not self.shared:
            return np.arange(len(lengths))
        keys = [
            (self.side(document), 0 if self.padded else length)
            for length, document in zip(lengths, longest, strict=True)
        ]
        order = sorted(set(keys))
        return np.array([order.index(key) for key in keys], np.int64)

    def in_words(self) -> str:
        """What is kept apart, for a note and a fingerprint."""
        if not self.shared:
            return "every document in a pass of its own"
        said = [] if self.padded else ["documents of one length in a pass, unpadded"]
        said += [f"documents of up to {n} tokens apart from longer ones" for n in self.switches]
        return ", ".join(said)


TOGETHER = Passes()


def switches_of(config: Any) -> tuple[int, ...]:
    """The lengths beyond which a model reads positions otherwise, from its config of transformers,
    whose rotary embedding may differ from layer to layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [found, *(value for value in found.values() if isinstance(value, dict))]
    lengths = {
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for rope in each
        if rope.get("rope_type", rope.get("type")) in CHOSEN_PER_PASS
    }
    return tuple(sorted(int(length) for length in lengths if length))
