"""Answers of given numbers, encoded as a teacher encodes what it found."""

import numpy as np
import torch
from torch import Tensor

from shared.targets.soft_targets import TargetArrays
from shared.targets.spec import TargetSpec
from teacher_service.scoring.encoding import encode
from teacher_service.scoring.scoring import Selection


def encoded(spec: TargetSpec, arrays: TargetArrays) -> dict[str, np.ndarray]:
    """The columns of a `SoftTargets`. Ids may come in any order, unless they are the whole
    vocabulary, and a drawn one has the log-probability -inf; states that are bfloat16 bits are
    read as such."""
    found = Selection(
        ids_NK=torch.from_numpy(arrays.ids_NK.astype(np.int64)),
        logprobs_NK=torch.tensor(arrays.logprobs_NK),
        log_tail_NS=torch.tensor(arrays.log_tail_NS),
        label_logprob_N=torch.tensor(arrays.label_logprob_N),
        entropy_N=None if arrays.entropy_N is None else torch.tensor(arrays.entropy_N),
    )
    hidden = {layer: _states(states_ND) for layer, states_ND in arrays.hidden_ND.items()}
    last_ND = None if arrays.last_ND is None else _states(arrays.last_ND)
    return encode(found, spec, hidden=hidden, last_ND=last_ND)


def _states(states_ND: np.ndarray) -> Tensor:
    states = torch.tensor(states_ND)
    return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states
