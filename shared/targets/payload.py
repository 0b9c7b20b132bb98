"""What an answer costs per token, from its columns."""

from dataclasses import dataclass, replace

from shared.config.base import Dtype
from shared.targets.asks.kept_ids import LikeliestIds
from shared.targets.asks.last_states import LastStates
from shared.targets.question import Question

BYTES = {"float32": 4, "bfloat16": 2}


def bytes_per_token(question: Question, *, hidden_width: int) -> dict[str, float]:
    """Bytes of a Table per position with loss, by what they hold, row overheads apart;
    `hidden_width` as shipped."""
    found = dict.fromkeys(question.ask.holds, 0.0)
    for column in question.columns(hidden_width).values():
        found[column.holds] = found.get(column.holds, 0.0) + column.num_bytes
    return found


@dataclass(frozen=True, slots=True)
class Pair:
    """What decides the price of states: the teacher's width and head, and its type."""

    teacher_width: int
    teacher_rows: int
    dtype: Dtype

    @property
    def head_bytes(self) -> int:
        """Of the LM head's weight, which each worker reads once."""
        return self.teacher_rows * self.teacher_width * BYTES[self.dtype]


def payload_note(question: Question, *, hidden_width: int, pair: Pair, top_k: int) -> str:
    """Sentences for the start of a run: what its answers cost, and what the other kind would.

    `top_k` is what ids would be asked for where states are. Where bits count the entries of a
    column, their number depends on the text, so that costs are about as said.
    """
    found = bytes_per_token(question, hidden_width=hidden_width)
    parts = ", ".join(f"{kind} {round(size):,}" for kind, size in found.items())
    total, once = round(sum(found.values())), f"the head once {pair.head_bytes / 1e6:,.1f} MB"
    counted = any(column.counted_by for column in question.ask.columns().values())
    about = "about " if counted else ""
    said = f"a token costs {about}{total:,} bytes from the teacher: {parts}"
    vocabulary = question.ask.shared_vocab
    if isinstance(question.ask, LastStates):
        ids = replace(question, ask=LikeliestIds(top_k, vocabulary))
        instead = sum(bytes_per_token(ids, hidden_width=hidden_width).values())
        return f"{said}; and {once}; the {top_k} likeliest ids would cost {round(instead):,}"
    own_type = "bf16" if pair.dtype == "bfloat16" else "fp32"
    states = replace(question, ask=LastStates(vocabulary, "other", own_type, pair.teacher_width))
    instead = sum(bytes_per_token(states, hidden_width=hidden_width).values())
    return f"{said}; with targets.exact=last_hidden {round(instead):,}, and {once}"
