"""From a teacher's device to the host: numbers in the types in which they travel, so that the copy
from a GPU is narrow. Ids take 4 bytes until the host packs them, and log-probabilities where int8
needs the tail.

N positions with loss   K ids kept per position   S temperatures   D hidden width
"""

import numpy as np
import torch
from torch import Tensor

from shared.encoding import LARGEST
from shared.soft_targets import TargetArrays
from shared.target_spec import TargetSpec
from teacher_service.scoring import Selection

STEPS = 127  # of int8, either side of 0


@torch.inference_mode()
def to_host(selection: Selection, hidden: dict[int, Tensor], spec: TargetSpec) -> TargetArrays:
    """What a teacher found, by layer of `hidden` [N, D], as arrays for a `SoftTargets`."""
    scale: dict[int, np.ndarray] = {}
    if spec.hidden_encoding == "int8":
        pairs = {layer: states_in_int8(states_ND) for layer, states_ND in hidden.items()}
        hidden = {layer: steps_ND for layer, (steps_ND, _) in pairs.items()}
        scale = {layer: _host(scale_N) for layer, (_, scale_N) in pairs.items()}
    elif spec.hidden_encoding == "bf16":
        hidden = {layer: states.bfloat16().view(torch.uint16) for layer, states in hidden.items()}
    else:
        hidden = {layer: states_ND.float() for layer, states_ND in hidden.items()}
    logprobs_NK, entropy_N = selection.logprobs_NK, selection.entropy_N
    return TargetArrays(
        ids_NK=_host(selection.ids_NK.int()),
        logprobs_NK=_host(in_float16(logprobs_NK) if spec.encoding == "fp16" else logprobs_NK),
        log_tail_NS=_host(selection.log_tail_NS),
        label_logprob_N=_host(selection.label_logprob_N),
        hidden_ND={layer: _host(states_ND) for layer, states_ND in hidden.items()},
        hidden_scale_N=scale,
        entropy_N=None if entropy_N is None else _host(entropy_N),
    )


def in_float16(logprobs_NK: Tensor) -> Tensor:
    """Rounded as `shared.encoding.in_float16` does, but -inf, which marks ids that were drawn,
    stays."""
    rounded_NK = logprobs_NK.clamp(min=-float(LARGEST)).half()
    return rounded_NK.masked_fill_(logprobs_NK == -torch.inf, -torch.inf)


def states_in_int8(states_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to 127 steps either side of 0, int8, and the size of a step per position [N],
    float32."""
    states_ND = states_ND.float()
    scale_N = states_ND.abs().amax(1) / STEPS
    steps_ND = states_ND / torch.where(scale_N > 0, scale_N, 1)[:, None]
    return steps_ND.round_().to(torch.int8), scale_N


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
