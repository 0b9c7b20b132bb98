"""TargetSpec: what is asked of a teacher about a row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shared.targets.head_location import StatesEncoding

IdsEncoding = Literal["elias_fano", "plain"]

# What `TargetSpec.as_dict` leaves out.
UNNAMED = {
    "entropy": False,
    "selector": "top_k",
    "seed": 0,
    "prompts": "",
    "head": "",
    "states": "",
    "states_width": 0,
    "student_ids": 0,
}


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What is asked of the teacher; with the row and the teacher it determines the answer."""

    top_k: int
    shared_vocab: int  # ids both tokenizers know; only these are selected, the rest is tail
    temperatures: tuple[float, ...] = (1.0,)
    encoding: Literal["fp16", "int8", "fp32"] = "fp16"  # of the kept log-probabilities
    hidden_layers: tuple[int, ...] = ()
    hidden_encoding: Literal["bf16", "int8", "fp32"] = "bf16"
    projection: str = ""  # digest of the matrices the hidden states pass through; "": none
    entropy: bool = False  # of the teacher's whole distribution, per position
    # How ids are chosen: the most likely, or drawn by the teacher's probabilities at the one
    # temperature; of what a seed gives for a row, its draw (`Rows.with_draws`) names one.
    selector: Literal["top_k", "threshold", "sampled"] = "top_k"
    seed: int = 0
    prompts: str = ""  # digest of the prompts the teacher is shown; "": none
    head: str = ""  # digest of the teacher's head, whose input travels whole in place of ids
    states: StatesEncoding | Literal[""] = ""  # type of that input, the teacher's own
    states_width: int = 0  # its numbers per position
    # Of the `top_k` ids kept, those that the student names with the rows
    # (`Rows.with_student_ids`); the others are the most likely beside them.
    student_ids: int = 0

    # How the ids are written: it loses nothing and is no part of the question.
    ids: IdsEncoding = field(default="elias_fano", compare=False)

    @property
    def is_full(self) -> bool:
        """Whether every shared id is kept, so that ids need not be named at all."""
        return self.top_k == self.shared_vocab and not self.is_drawn

    @property
    def is_drawn(self) -> bool:
        """Whether the ids kept are drawn, so that they carry weights and there is no tail."""
        return self.selector != "top_k"

    @property
    def names_ids(self) -> bool:
        """Whether answers hold a column of ids."""
        return not self.is_full and not self.head

    def as_dict(self) -> dict[str, Any]:
        """Fields that JSON takes. Some are named only where they are not as `UNNAMED` has them, so
        that answers are called on disk what they were called before there were any others."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if UNNAMED.get(name, ...) != value}

    def question(self) -> dict[str, Any]:
        """The fields that decide what is answered."""
        return {name: value for name, value in self.as_dict().items() if name != "ids"}

    @staticmethod
    def from_dict(fields: Mapping) -> "TargetSpec":
        """The inverse of `as_dict`, also after a trip through JSON."""
        tuples = {name: tuple(fields[name]) for name in ("temperatures", "hidden_layers")}
        return TargetSpec(**{**fields, **tuples})

    def in_words(self) -> str:
        """The question as a message names it."""
        layers = ""
        if self.hidden_layers:
            layers = f", hidden layers {_listed(self.hidden_layers)} in {self.hidden_encoding}"
        kept = (
            f"{self.selector} {self.top_k} of {self.shared_vocab:,} ids at temperature "
            f"{_listed(self.temperatures)} in {self.encoding}"
        )
        if self.student_ids:
            kept += f", {self.student_ids} of them named by the student"
        if self.head:
            kept = f"last hidden states in {self.states} before the head {self.head[:8]}"
        return (
            f"{kept}{layers}"
            f"{', entropy' if self.entropy else ''}"
            f"{f', seed {self.seed}' if self.is_drawn else ''}"
            f"{f', shown prompts {self.prompts[:8]}' if self.prompts else ''}"
        )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
