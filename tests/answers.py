"""Questions by their stored names, and answers of given numbers, encoded as a teacher encodes what
it found."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from teacher_service.scoring.answering import encode
from teacher_service.scoring.scoring import Selection


@dataclass(frozen=True)
class Given:
    """What an answer says, of any kind, by the names that hold for most."""

    ids_NK: np.ndarray
    logprobs_NK: np.ndarray  # of drawn ids, their log-weights
    log_tail_NS: np.ndarray
    label_logprob_N: np.ndarray
    hidden_ND: dict[int, np.ndarray]
    entropy_N: np.ndarray | None = None
    last_ND: np.ndarray | None = None


def question_of(top_k: int, shared_vocab: int, **stored: Any) -> Question:
    """A question from the fields under which it lies in stores."""
    return Question.from_dict({"top_k": top_k, "shared_vocab": shared_vocab, **stored})


def changed(question: Question, **stored: Any) -> Question:
    """The question with other fields."""
    return Question.from_dict(question.as_dict() | stored)


def encoded(question: Question, given: Given) -> dict[str, np.ndarray]:
    """The columns of a `SoftTargets`. Ids may come in any order, unless they are the whole
    vocabulary, and a drawn one has the log-probability -inf; states that are bfloat16 bits are
    read as such."""
    found = Selection(
        ids_NK=torch.from_numpy(given.ids_NK.astype(np.int64)),
        logprobs_NK=torch.tensor(given.logprobs_NK),
        log_tail_NS=torch.tensor(given.log_tail_NS),
        label_logprob_N=torch.tensor(given.label_logprob_N),
        entropy_N=None if given.entropy_N is None else torch.tensor(given.entropy_N),
    )
    hidden = {layer: _states(states_ND) for layer, states_ND in given.hidden_ND.items()}
    last_ND = None if given.last_ND is None else _states(given.last_ND)
    return encode(found, question, hidden=hidden, last_ND=last_ND)


def decoded(answer: SoftTargets) -> Given:
    """What an answer says, by the same names."""
    arrays = answer.arrays()
    kept, none_N0 = arrays.kept, np.empty((len(arrays.label_logprob_N), 0), np.float32)
    return Given(
        ids_NK=kept.get("ids_NK", none_N0.astype(np.int64)),
        logprobs_NK=kept.get("logprobs_NK", kept.get("log_weights_NK", none_N0)),
        log_tail_NS=kept.get("log_tail_NS", none_N0),
        label_logprob_N=arrays.label_logprob_N,
        hidden_ND=arrays.hidden_ND,
        entropy_N=arrays.entropy_N,
        last_ND=kept.get("teacher_last_NE"),
    )


def _states(states_ND: np.ndarray) -> Tensor:
    states = torch.tensor(states_ND)
    return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states
