"""The pieces of an answer's columns, made on the device where they were found: what is copied from
there to the host are the bytes that travel.

N positions with loss   K ids kept per position   D hidden width   P bits   W bytes of a position
Log-probabilities are nats, normalised over the teacher's whole vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shared.errors import TeacherError
from shared.targets.asks.kept_ids import KeptIds
from shared.targets.codec.decoding import LOGPROB_STEPS
from shared.targets.codec.elias_fano import EliasFano
from shared.targets.question import HiddenAsk, hidden_column, scale_column
from teacher_service.scoring.scoring import Selection

LARGEST = torch.finfo(torch.float16).max
STATE_STEPS = 127  # of int8, either side of 0
UNSOUND_LEVEL = 0.05  # nats between the kept mass and what the tail leaves, where that is much
STATE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Ids that are encoded at a time: on a CPU so that its caches hold what is computed of them.
PART_IDS = {"cpu": 2**17, "cuda": 2**24}


def in_float16(logprobs: Tensor) -> Tensor:
    """Rounded, never below the smallest number: such a probability is 0 anyway."""
    return logprobs.half().clamp_(min=-LARGEST)


def logprobs_in_int8(logprobs_NK: Tensor, log_tail_N: Tensor) -> tuple[Tensor, Tensor]:
    """255 equal steps down from each position's most likely id to its least likely: the steps
    [N, K], uint8, and the distance in nats from top to bottom [N], float16.

    The level of the top is not written, since the kept ids share what the tail leaves. Raises
    TeacherError where they do not.
    """
    _refuse_other_sums(logprobs_NK, log_tail_N)
    return steps_down(logprobs_NK.amax(1, keepdim=True) - logprobs_NK)


def states_in_int8(states_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to 127 steps either side of 0, int8, and the size of a step per position [N],
    float32."""
    states_ND = states_ND.float()
    scale_N = states_ND.abs().amax(1) / STATE_STEPS
    steps_ND = states_ND / torch.where(scale_N > 0, scale_N, 1)[:, None]
    return steps_ND.round_().to(torch.int8), scale_N


def ids_in_bytes(ids_NK: Tensor, code: EliasFano) -> Tensor:
    """What `EliasFano.encode` gives, uint8 [N, W], on the device of the ids, which ascend along
    K."""
    place_K = torch.arange(code.num_ids, device=ids_NK.device)
    high_NP = torch.zeros(len(ids_NK), code.places, dtype=torch.uint8, device=ids_NK.device)
    high_NP.scatter_(1, (ids_NK >> code.low_bits) + place_K, 1)
    parts = [packed(high_NP)]
    whole, single = divmod(code.low_bits, 8)
    parts += [(ids_NK >> 8 * byte).to(torch.uint8) for byte in range(whole)]
    if single:
        low_NK = (ids_NK >> 8 * whole).to(torch.uint8)
        planes = [(low_NK >> bit) & 1 for bit in range(single)]
        parts.append(packed(torch.cat(planes, dim=1)))
    return torch.cat(parts, dim=1)


def in_parts(found: Selection) -> Iterator[Selection]:
    """Positions of a selection, a few at a time, at least one part."""
    num, size = found.ids_NK.shape
    step = max(1, PART_IDS.get(found.ids_NK.device.type, PART_IDS["cuda"]) // max(1, size))
    for start in range(0, max(1, num), step):
        rows = slice(start, start + step)
        yield Selection(
            found.ids_NK[rows],
            found.logprobs_NK[rows],
            found.log_tail_NS[rows],
            found.label_logprob_N[rows],
        )


def packed(bits_NP: Tensor) -> Tensor:
    """Bytes [N, W] of bits that are a byte each, the first the least significant; zeros fill the
    last byte."""
    eights_NW = torch.nn.functional.pad(bits_NP, (0, -bits_NP.shape[1] % 8)).contiguous()
    folded_NW = eights_NW.view(torch.int64)  # bit 8 i is to be bit i
    for distance in (7, 14, 28):
        folded_NW = folded_NW | folded_NW >> distance
    return folded_NW.to(torch.uint8)


def ascending(ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in order, int32, and the places they had; equal ones stay as they were. On a CPU numpy
    sorts ids and places as one number each, several times as fast."""
    if ids_NK.device.type != "cpu":
        return ids_NK.int().sort(dim=1, stable=True)
    size = ids_NK.shape[1]
    keys_NK = (ids_NK << size.bit_length()) | torch.arange(size)
    keys_NK.numpy().sort(axis=1)
    return (keys_NK >> size.bit_length()).int(), keys_NK & (1 << size.bit_length()) - 1


def steps_down(below_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from the top, overwritten, in 255 steps, uint8, and the largest [N], float16."""
    range_N = below_NK.amax(1).clamp(max=LARGEST).half()
    step_N1 = (torch.where(range_N > 0, range_N, 1).float() / LOGPROB_STEPS)[:, None]
    below_NK.div_(step_N1).clamp_(max=LOGPROB_STEPS).round_()
    return below_NK.to(torch.uint8), range_N


def ids_as_asked(ids_NK: Tensor, ask: KeptIds) -> Tensor:
    """Ascending ids as `ask.ids` says: the bytes of `EliasFano`, or the least whole integers.
    Raises TeacherError for ids that are not shared."""
    if ((ids_NK < 0) | (ids_NK >= ask.shared_vocab)).any():
        raise TeacherError(
            f"the teacher selected ids {ids_NK.min()} to {ids_NK.max()} of {ask.shared_vocab:,} "
            "shared ones"
        )
    if ask.ids == "plain":
        return ids_NK.to(torch.uint16 if ask.shared_vocab <= 2**16 else torch.int32)
    return ids_in_bytes(ids_NK, ask.code)


def hidden_columns(layer: int, states_ND: Tensor, asked: HiddenAsk) -> dict[str, Tensor]:
    """The columns of a layer's states [N, D]."""
    name = hidden_column(layer)
    if asked.encoding != "int8":
        return {name: states_ND.to(STATE_TYPES[asked.encoding])}
    steps_ND, scale_N = states_in_int8(states_ND)
    return {scale_column(layer): scale_N, name: steps_ND}


def on_host(tensor: Tensor) -> np.ndarray:
    """bfloat16 as its bits."""
    tensor = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return tensor.cpu().numpy()


def refuse_non_finite(name: str, finite: Tensor) -> None:
    """Raise TeacherError where not everything is `finite`."""
    if not finite.all():
        raise TeacherError(f"the teacher computed a non-finite {name}")


def _refuse_other_sums(logprobs_NK: Tensor, log_tail_N: Tensor) -> None:
    """What is kept and what the tail leaves, where that is more than a thousandth."""
    left_N = -torch.expm1(log_tail_N.double())
    off_N = (logprobs_NK.logsumexp(1).double() - left_N.log()).abs()
    if ((off_N > UNSOUND_LEVEL) & (left_N > 1e-3)).any():
        raise TeacherError(
            "the teacher's kept and tail probabilities do not sum to 1, which targets.encoding "
            "int8 builds on; use fp16"
        )
