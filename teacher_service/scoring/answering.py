"""How a teacher answers each kind of ask: what it finds in its last hidden states, and the columns
it makes of that.

N positions with loss   K ids kept per position   S temperatures   D hidden width   V head rows
H ids kept exactly, of all positions   W bytes of a position   M ids that the student names
Log-probabilities are nats, normalised over the teacher's whole vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from shared.data.rows import Rows
from shared.errors import ConfigError, HandshakeError, TeacherError
from shared.targets.asks.ask import Ask
from shared.targets.asks.drawn_ids import DrawnIds, SampledIds, ThresholdIds
from shared.targets.asks.kept_ids import KeptIds, LikeliestIds
from shared.targets.asks.last_states import LastStates
from shared.targets.codec.decoding import EXACT, LOGPROBS, RANGE
from shared.targets.draws import uniforms
from shared.targets.question import Question
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.encoding import (
    STATE_TYPES,
    ascending,
    hidden_columns,
    ids_as_asked,
    in_float16,
    in_parts,
    logprobs_in_int8,
    on_host,
    packed,
    refuse_non_finite,
    steps_down,
)
from teacher_service.scoring.scoring import ScoringHead, Selection, select

A = TypeVar("A", bound=Ask)
K = TypeVar("K", bound=KeptIds)


@dataclass(frozen=True, slots=True)
class Scored:
    """A unit after the forward pass."""

    rows: Rows
    last_ND: Tensor  # the head's input at the positions with loss
    label_N: Tensor
    head: ScoringHead


class Answerer(ABC, Generic[A]):
    """Answers one kind of ask."""

    def refuse(self, ask: A, rows: Rows) -> None:
        """Raise UserError for what can never be answered about these rows."""
        return

    def find(self, ask: A, scored: Scored) -> Selection:
        """What is asked about each position; here the label's log-probability alone."""
        return select(
            scored.last_ND, scored.head, scored.label_N, num_ids=0, shared_vocab=ask.shared_vocab
        )

    @abstractmethod
    def columns(self, ask: A, found: Selection, last_ND: Tensor | None) -> dict[str, Tensor]:
        """The columns that `ask.columns` names; `last_ND` is the head's input. Raises TeacherError
        for what is unsound."""


class _KeptIds(Answerer[K]):
    def refuse(self, ask: K, rows: Rows) -> None:
        if ask.num_ids > ask.shared_vocab:
            raise ConfigError(
                f"{ask.num_ids} ids are asked for, above the {ask.shared_vocab} that teacher and "
                "student share; lower targets.top_k"
            )

    def columns(self, ask: K, found: Selection, last_ND: Tensor | None) -> dict[str, Tensor]:
        self.refuse_unsound(ask, found)
        parts = [self.columns_of_part(ask, part) for part in in_parts(found)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @abstractmethod
    def refuse_unsound(self, ask: K, found: Selection) -> None: ...

    @abstractmethod
    def columns_of_part(self, ask: K, found: Selection) -> dict[str, Tensor]: ...


class _LikeliestIds(_KeptIds[LikeliestIds]):
    def refuse(self, ask: LikeliestIds, rows: Rows) -> None:
        super().refuse(ask, rows)
        if ask.student_ids:
            _refuse_student_ids(ask, rows)

    def find(self, ask: LikeliestIds, scored: Scored) -> Selection:
        named_NM = scored.rows.student_ids() if ask.student_ids else None
        return select(
            scored.last_ND,
            scored.head,
            scored.label_N,
            num_ids=ask.num_ids,
            shared_vocab=ask.shared_vocab,
            temperatures=ask.temperatures,
            entropy=ask.entropy,
            named_NM=None if named_NM is None else torch.from_numpy(named_NM.astype(np.int64)),
        )

    def refuse_unsound(self, ask: LikeliestIds, found: Selection) -> None:
        refuse_non_finite("logprobs", found.logprobs_NK.isfinite())
        if not ask.names_ids:
            every_V = torch.arange(ask.shared_vocab, device=found.ids_NK.device)
            if not (found.ids_NK == every_V).all():
                raise TeacherError("the teacher ships the whole vocabulary and not in order")

    def columns_of_part(self, ask: LikeliestIds, found: Selection) -> dict[str, Tensor]:
        logprobs_NK, columns = found.logprobs_NK, {}
        if ask.names_ids:
            ids_NK, order_NK = ascending(found.ids_NK)
            logprobs_NK = logprobs_NK.gather(1, order_NK)
            columns["top_ids"] = ids_as_asked(ids_NK, ask)
        if ask.encoding == "int8":
            tail_N = found.log_tail_NS[:, ask.temperatures.index(1.0)]
            logprobs_NK, columns["top_logprobs_range"] = logprobs_in_int8(logprobs_NK, tail_N)
        elif ask.encoding == "fp16":
            logprobs_NK = in_float16(logprobs_NK)
        return columns | {"top_logprobs": logprobs_NK, "log_tail": found.log_tail_NS}


D = TypeVar("D", bound=DrawnIds)


class _DrawnIds(_KeptIds[D]):
    def find(self, ask: D, scored: Scored) -> Selection:
        numbers_NU = uniforms(scored.rows, seed=ask.seed, count=ask.num_uniforms)
        return draw(
            scored.last_ND,
            scored.head,
            scored.label_N,
            uniform_NU=torch.from_numpy(numbers_NU),
            selector=ask.selector,
            num_ids=ask.num_ids,
            shared_vocab=ask.shared_vocab,
            temperature=ask.temperature,
        )

    def refuse_unsound(self, ask: D, found: Selection) -> None:
        """The log-probability of an id that is not kept exactly is -inf."""
        logprobs_NK = found.logprobs_NK
        refuse_non_finite("logprobs", logprobs_NK.isfinite() | (logprobs_NK == -torch.inf))


class _SampledIds(_DrawnIds[SampledIds]):
    def columns_of_part(self, ask: SampledIds, found: Selection) -> dict[str, Tensor]:
        ids_NK, _ = ascending(found.ids_NK)
        return {"top_ids": ids_as_asked(ids_NK, ask), "log_tail": found.log_tail_NS}


class _ThresholdIds(_DrawnIds[ThresholdIds]):
    def columns_of_part(self, ask: ThresholdIds, found: Selection) -> dict[str, Tensor]:
        """Ids ascending, bits of those that are kept exactly [N, W] and their log-probabilities
        [H].

        Without a tail the others are empty slots, which repeat the largest id of the position; they
        come after the id they repeat, as selections name the most likely ids first.
        """
        empty_NK = (found.log_tail_NS == -torch.inf) & (found.logprobs_NK == -torch.inf)
        largest_N1 = found.ids_NK.masked_fill(empty_NK, -1).amax(1, keepdim=True)
        ids_NK, order_NK = ascending(torch.where(empty_NK, largest_N1, found.ids_NK))
        logprobs_NK, range_ = found.logprobs_NK.gather(1, order_NK), {}
        exact_NK = logprobs_NK > -torch.inf
        if ask.encoding == "int8":
            top_N1 = logprobs_NK.amax(1, keepdim=True)
            logprobs_NK, range_[RANGE] = steps_down(torch.where(exact_NK, top_N1 - logprobs_NK, 0))
        elif ask.encoding == "fp16":
            logprobs_NK = in_float16(logprobs_NK)
        return {
            "top_ids": ids_as_asked(ids_NK, ask),
            "log_tail": found.log_tail_NS,
            EXACT: packed(exact_NK.to(torch.uint8)),
            LOGPROBS: logprobs_NK[exact_NK],
            **range_,
        }


class _LastStates(Answerer[LastStates]):
    def columns(
        self, ask: LastStates, found: Selection, last_ND: Tensor | None
    ) -> dict[str, Tensor]:
        assert last_ND is not None, "the engine ships what is asked for"
        last_ND = last_ND.to(STATE_TYPES[ask.states])
        refuse_non_finite("last_hidden", last_ND.isfinite())
        return {"last_hidden": last_ND}


ANSWERERS: dict[type[Ask], Answerer[Any]] = {
    LikeliestIds: _LikeliestIds(),
    ThresholdIds: _ThresholdIds(),
    SampledIds: _SampledIds(),
    LastStates: _LastStates(),
}


def refuse(question: Question, rows: Rows) -> None:
    """Raise UserError for what can never be answered about these rows."""
    ANSWERERS[type(question.ask)].refuse(question.ask, rows)


def find(question: Question, scored: Scored) -> Selection:
    """What is asked about each position of a unit."""
    return ANSWERERS[type(question.ask)].find(question.ask, scored)


@torch.inference_mode()
def encode(
    found: Selection,
    question: Question,
    *,
    hidden: Mapping[int, Tensor] | None = None,
    last_ND: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The columns of a `SoftTargets`, on the host: of what was found, of the head's input `last_ND`
    where the question asks for that instead, and of hidden states [N, D] by layer.

    Raises TeacherError where a number is not finite or a mass is none.
    """
    refuse_non_finite("label_logprob", found.label_logprob_N.isfinite())
    if found.entropy_N is not None:
        refuse_non_finite("entropy", found.entropy_N.isfinite())
    if not (found.log_tail_NS <= 0).all():  # -inf where nothing is left
        raise TeacherError("the teacher computed a tail mass outside [0, 1]")
    ask = question.ask
    columns = ANSWERERS[type(ask)].columns(ask, found, last_ND)
    columns["label_logprob"] = found.label_logprob_N
    if ask.with_entropy:
        assert found.entropy_N is not None, "the engine computes what is asked for"
        columns["entropy"] = found.entropy_N
    for layer, states_ND in (hidden or {}).items():
        columns |= hidden_columns(layer, states_ND, question.hidden)
    return {name: on_host(column) for name, column in columns.items()}


def _refuse_student_ids(ask: LikeliestIds, rows: Rows) -> None:
    """Ids that are missing, not as many as asked for, unknown, or named twice."""
    ids_NM = rows.student_ids()
    num, wanted = int(rows.num_loss_tokens().sum()), ask.student_ids
    if wanted >= ask.num_ids:
        raise ConfigError(
            f"{wanted} ids of the student are asked for among {ask.num_ids} in all; they need room "
            "for others"
        )
    found = "none" if ids_NM is None else f"{ids_NM.shape[1]} at {len(ids_NM)}"
    if ids_NM is None or ids_NM.shape != (num, wanted):
        raise HandshakeError(
            f"rows {rows.named()} should come with {wanted} ids of the student at {num} positions "
            f"and come with {found}; run teacher and trainer in the same version"
        )
    if ids_NM.size and not 0 <= ids_NM.min() <= ids_NM.max() < ask.shared_vocab:
        raise HandshakeError(
            f"the student asks about ids {ids_NM.min()} to {ids_NM.max()} in rows {rows.named()}, "
            f"and it shares {ask.shared_vocab} with the teacher; use a student that shares its "
            "tokenizer"
        )
    if not np.diff(np.sort(ids_NM, axis=1), axis=1).all():
        raise HandshakeError(
            f"the student asks about one id twice at a position of rows {rows.named()}; run "
            "teacher and trainer in the same version"
        )
