"""Question: what is asked of a teacher about a row; with the row it determines the answer.

N positions with loss   E width of the hidden states shipped
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from shared.targets.asks.ask import MASSES, Ask, listed
from shared.targets.asks.classes import ClassLogProbs, HeadLogProbs, SoftLabels
from shared.targets.asks.drawn_ids import SampledIds, ThresholdIds
from shared.targets.asks.kept_ids import KeptIds, LikeliestIds
from shared.targets.asks.last_states import LastStates
from shared.targets.codec.columns import STATE_TYPES, Column, Columns
from shared.targets.weights import WeightsRef

if TYPE_CHECKING:
    from shared.config.selectors import Selector

ASKS: dict[str, type[Ask]] = {
    ask.selector: ask
    for ask in (
        *(LikeliestIds, ThresholdIds, SampledIds, LastStates),
        *(ClassLogProbs, HeadLogProbs, SoftLabels),
    )
}

# What `targets.selector` of a config asks; renormalised asks as top_k does, and its losses leave
# the mass of all other ids out.
ASKED_BY: "dict[Selector, type[KeptIds]]" = {
    "top_k": LikeliestIds,
    "renormalised": LikeliestIds,
    "threshold": ThresholdIds,
    "sampled": SampledIds,
}

# A question as it lies in stores and in the metadata of Tables: all kinds in one flat dict, in this
# order, with these values where an ask has no others.
STORED: dict[str, Any] = {
    "top_k": 0,
    "shared_vocab": 0,
    "temperatures": (1.0,),
    "encoding": "fp16",
    "hidden_layers": (),
    "hidden_encoding": "bf16",
    "projection": "",
    "entropy": False,
    "selector": "top_k",
    "seed": 0,
    "prompts": "",
    "head": "",
    "states": "",
    "states_width": 0,
    "student_ids": 0,
    "ids": "elias_fano",
    "weights": None,
}
# Those that are named whatever their values; the others only where they differ, so that answers are
# called what they were called before there were others.
ALWAYS_STORED = (
    "top_k",
    "shared_vocab",
    "temperatures",
    "encoding",
    "hidden_layers",
    "hidden_encoding",
    "projection",
    "ids",
)


@dataclass(frozen=True, slots=True)
class HiddenAsk:
    """Hidden states of some of the teacher's layers. Their encoding is part of a question also
    where no layer is asked for."""

    layers: tuple[int, ...] = ()
    encoding: Literal["bf16", "int8", "fp32"] = "bf16"
    projection: str = ""  # digest of the matrices the states pass through; "": none

    def columns(self, width: int) -> dict[str, Column]:
        """What its columns hold."""
        found = {}
        for layer in self.layers:
            if self.encoding == "int8":
                found[scale_column(layer)] = Column(pa.float32(), "hidden states")
            type_ = pa.list_(STATE_TYPES[self.encoding], width)
            found[hidden_column(layer)] = Column(type_, "hidden states")
        return found

    def decode(self, columns: Columns) -> dict[int, np.ndarray]:
        """States by layer [N, E]: float32, or uint16 holding bfloat16 bits (bf16)."""
        return {layer: self._states(layer, columns) for layer in self.layers}

    def width(self, schema: pa.Schema) -> int:
        """E of a Table, from the first layer's column; 0 where there is none of the kind."""
        place = schema.get_field_index(hidden_column(self.layers[0])) if self.layers else -1
        entry = getattr(schema.field(place).type, "value_type", None) if place >= 0 else None
        return getattr(entry, "list_size", 0)

    def in_words(self) -> str:
        """The ask as a message names it; empty where no layer is asked for."""
        if not self.layers:
            return ""
        return f"hidden layers {listed(self.layers)} in {self.encoding}"

    def _states(self, layer: int, columns: Columns) -> np.ndarray:
        states_NE = columns.matrix(hidden_column(layer))
        if self.encoding != "int8":
            return states_NE
        return states_NE.astype(np.float32) * columns.vector(scale_column(layer))[:, None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about every row of a unit."""

    ask: Ask
    hidden: HiddenAsk = field(default=HiddenAsk(), kw_only=True)
    prefix: str = field(default="", kw_only=True)  # digest of the prompts shown; "": none
    # The version of a teacher's weights, or of modules on it, that answers; None: it as loaded.
    weights: WeightsRef | None = field(default=None, kw_only=True)

    def columns(self, hidden_width: int) -> dict[str, Column]:
        """What every column of an answer holds, in the order of a Table; hidden states are as wide
        as the teacher's or their projection."""
        found = self.ask.columns() | {"label_logprob": Column(pa.float32(), MASSES)}
        if self.ask.with_entropy:
            found["entropy"] = Column(pa.float32(), MASSES)
        return found | self.hidden.columns(hidden_width)

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes, as they lie in stores."""
        hidden = self.hidden
        fields = {
            **STORED,
            "hidden_layers": hidden.layers,
            "hidden_encoding": hidden.encoding,
            "projection": hidden.projection,
            "prompts": self.prefix,
            "weights": self.weights and asdict(self.weights),
            **self.ask.stored(),
        }
        return {
            name: value
            for name, value in fields.items()
            if name in ALWAYS_STORED or STORED.get(name, ...) != value
        }

    def identity(self) -> dict[str, Any]:
        """The fields that decide what is answered."""
        return {name: value for name, value in self.as_dict().items() if name != "ids"}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Question":
        """The inverse of `as_dict`, also after a trip through JSON. Raises KeyError for a kind that
        is not known."""
        fields = STORED | dict(fields)
        selector = LastStates.selector if fields["head"] else fields["selector"]
        return Question(
            ASKS[selector].from_stored(fields),
            hidden=HiddenAsk(
                tuple(fields["hidden_layers"]), fields["hidden_encoding"], fields["projection"]
            ),
            prefix=fields["prompts"],
            weights=fields["weights"] and WeightsRef(**fields["weights"]),
        )

    def in_words(self) -> str:
        """The question as a message names it."""
        shown = f"shown prompts {self.prefix[:8]}" if self.prefix else ""
        of = f"of weights of version {self.weights.version}" if self.weights else ""
        return ", ".join(filter(None, (self.ask.in_words(), self.hidden.in_words(), shown, of)))


def hidden_column(layer: int) -> str:
    """Name of the column of a teacher layer's hidden states."""
    return f"hidden_{layer}"


def scale_column(layer: int) -> str:
    """Name of the column with the int8 states' step of each position."""
    return f"hidden_{layer}_scale"
