"""From what a teacher found to the columns of its answer, on the device where it was found: what is
copied from there to the host are the bytes that travel.

N positions with loss   K ids kept per position   S temperatures   D hidden width
H ids kept exactly, of all positions   P bits   W bytes of a position
Log-probabilities are nats, normalised over the teacher's whole vocabulary.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from shared.errors import TeacherError
from shared.targets.decoding import EXACT, LOGPROB_STEPS, LOGPROBS, RANGE
from shared.targets.elias_fano import EliasFano
from shared.targets.soft_targets import hidden_column, scale_column
from shared.targets.spec import TargetSpec
from teacher_service.scoring.scoring import Selection

LARGEST = torch.finfo(torch.float16).max
STATE_STEPS = 127  # of int8, either side of 0
UNSOUND_LEVEL = 0.05  # nats between the kept mass and what the tail leaves, where that is much
STATE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Ids that are encoded at a time: on a CPU so that its caches hold what is computed of them.
PART_IDS = {"cpu": 2**17, "cuda": 2**24}


@torch.inference_mode()
def encode(
    found: Selection,
    spec: TargetSpec,
    *,
    hidden: Mapping[int, Tensor] | None = None,
    last_ND: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The columns of a `SoftTargets`, on the host: of a selection, of the head's input `last_ND`
    where the spec asks for that instead, and of hidden states [N, D] by layer.

    Raises TeacherError where a number is not finite or a mass is none.
    """
    _refuse_unsound(found, spec)
    if spec.head:
        columns = {"last_hidden": _head_input(last_ND, spec)}
    else:
        columns_of = _drawn_columns if spec.is_drawn else _likeliest_columns
        parts = [columns_of(part, spec) for part in _parts(found)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    columns["label_logprob"] = found.label_logprob_N
    if spec.entropy:
        assert found.entropy_N is not None, "the engine computes what the spec asks for"
        columns["entropy"] = found.entropy_N
    for layer, states_ND in (hidden or {}).items():
        columns |= _hidden_columns(layer, states_ND, spec)
    return {name: _host(column) for name, column in columns.items()}


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
    return _steps_down(logprobs_NK.amax(1, keepdim=True) - logprobs_NK)


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
    parts = [_packed(high_NP)]
    whole, single = divmod(code.low_bits, 8)
    parts += [(ids_NK >> 8 * byte).to(torch.uint8) for byte in range(whole)]
    if single:
        low_NK = (ids_NK >> 8 * whole).to(torch.uint8)
        planes = [(low_NK >> bit) & 1 for bit in range(single)]
        parts.append(_packed(torch.cat(planes, dim=1)))
    return torch.cat(parts, dim=1)


def _parts(found: Selection) -> Iterator[Selection]:
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


def _packed(bits_NP: Tensor) -> Tensor:
    """Bytes [N, W] of bits that are a byte each, the first the least significant; zeros fill the
    last byte."""
    eights_NW = torch.nn.functional.pad(bits_NP, (0, -bits_NP.shape[1] % 8)).contiguous()
    folded_NW = eights_NW.view(torch.int64)  # bit 8 i is to be bit i
    for distance in (7, 14, 28):
        folded_NW = folded_NW | folded_NW >> distance
    return folded_NW.to(torch.uint8)


def _head_input(last_ND: Tensor | None, spec: TargetSpec) -> Tensor:
    assert last_ND is not None, "the engine ships what the spec asks for"
    assert spec.states, "a spec names the type of what it asks for"
    last_ND = last_ND.to(STATE_TYPES[spec.states])
    _refuse_non_finite("last_hidden", last_ND.isfinite())
    return last_ND


def _likeliest_columns(found: Selection, spec: TargetSpec) -> dict[str, Tensor]:
    logprobs_NK, columns = found.logprobs_NK, {}
    if not spec.is_full:
        ids_NK, order_NK = _ascending(found.ids_NK)
        logprobs_NK = logprobs_NK.gather(1, order_NK)
        columns["top_ids"] = _written(ids_NK, spec)
    if spec.encoding == "int8":
        tail_N = found.log_tail_NS[:, spec.temperatures.index(1.0)]
        logprobs_NK, columns["top_logprobs_range"] = logprobs_in_int8(logprobs_NK, tail_N)
    elif spec.encoding == "fp16":
        logprobs_NK = in_float16(logprobs_NK)
    return columns | {"top_logprobs": logprobs_NK, "log_tail": found.log_tail_NS}


def _drawn_columns(found: Selection, spec: TargetSpec) -> dict[str, Tensor]:
    """Ids ascending, bits of those that are kept exactly [N, W] and their log-probabilities [H].

    Without a tail the others of `threshold` are empty slots, which repeat the largest id of the
    position; they come after the id they repeat, as selections name the most likely ids first.
    """
    ids_NK = found.ids_NK
    if spec.selector == "threshold":
        empty_NK = (found.log_tail_NS == -torch.inf) & (found.logprobs_NK == -torch.inf)
        largest_N1 = ids_NK.masked_fill(empty_NK, -1).amax(1, keepdim=True)
        ids_NK = torch.where(empty_NK, largest_N1, ids_NK)
    ids_NK, order_NK = _ascending(ids_NK)
    columns = {"top_ids": _written(ids_NK, spec), "log_tail": found.log_tail_NS}
    if spec.selector == "sampled":
        return columns
    logprobs_NK, range_ = found.logprobs_NK.gather(1, order_NK), {}
    exact_NK = logprobs_NK > -torch.inf
    if spec.encoding == "int8":
        top_N1 = logprobs_NK.amax(1, keepdim=True)
        logprobs_NK, range_[RANGE] = _steps_down(torch.where(exact_NK, top_N1 - logprobs_NK, 0))
    elif spec.encoding == "fp16":
        logprobs_NK = in_float16(logprobs_NK)
    kept = {EXACT: _packed(exact_NK.to(torch.uint8)), LOGPROBS: logprobs_NK[exact_NK]}
    return columns | kept | range_


def _ascending(ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in order, int32, and the places they had; equal ones stay as they were. On a CPU numpy
    sorts ids and places as one number each, several times as fast."""
    if ids_NK.device.type != "cpu":
        return ids_NK.int().sort(dim=1, stable=True)
    size = ids_NK.shape[1]
    keys_NK = (ids_NK << size.bit_length()) | torch.arange(size)
    keys_NK.numpy().sort(axis=1)
    return (keys_NK >> size.bit_length()).int(), keys_NK & (1 << size.bit_length()) - 1


def _steps_down(below_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from the top, overwritten, in 255 steps, uint8, and the largest [N], float16."""
    range_N = below_NK.amax(1).clamp(max=LARGEST).half()
    step_N1 = (torch.where(range_N > 0, range_N, 1).float() / LOGPROB_STEPS)[:, None]
    below_NK.div_(step_N1).clamp_(max=LOGPROB_STEPS).round_()
    return below_NK.to(torch.uint8), range_N


def _written(ids_NK: Tensor, spec: TargetSpec) -> Tensor:
    """Ascending ids as `spec.ids` says: the bytes of `EliasFano`, or the least whole integers.
    Raises TeacherError for ids that are not shared."""
    if ((ids_NK < 0) | (ids_NK >= spec.shared_vocab)).any():
        raise TeacherError(
            f"the teacher selected ids {ids_NK.min()} to {ids_NK.max()} of {spec.shared_vocab:,} "
            "shared ones"
        )
    if spec.ids == "plain":
        return ids_NK.to(torch.uint16 if spec.shared_vocab <= 2**16 else torch.int32)
    return ids_in_bytes(ids_NK, EliasFano(spec.top_k, spec.shared_vocab))


def _hidden_columns(layer: int, states_ND: Tensor, spec: TargetSpec) -> dict[str, Tensor]:
    name = hidden_column(layer)
    if spec.hidden_encoding != "int8":
        return {name: states_ND.to(STATE_TYPES[spec.hidden_encoding])}
    steps_ND, scale_N = states_in_int8(states_ND)
    return {scale_column(layer): scale_N, name: steps_ND}


def _host(tensor: Tensor) -> np.ndarray:
    """bfloat16 as its bits."""
    tensor = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return tensor.cpu().numpy()


def _refuse_unsound(found: Selection, spec: TargetSpec) -> None:
    """A tail may be -inf: nothing is left; and so is the log-probability of an id that is drawn."""
    finite_NK = found.logprobs_NK.isfinite()
    if spec.is_drawn:
        finite_NK |= found.logprobs_NK == -torch.inf
    _refuse_non_finite("logprobs", finite_NK)
    _refuse_non_finite("label_logprob", found.label_logprob_N.isfinite())
    if found.entropy_N is not None:
        _refuse_non_finite("entropy", found.entropy_N.isfinite())
    if not (found.log_tail_NS <= 0).all():
        raise TeacherError("the teacher computed a tail mass outside [0, 1]")
    if spec.is_full:
        every_V = torch.arange(spec.shared_vocab, device=found.ids_NK.device)
        if not (found.ids_NK == every_V).all():
            raise TeacherError("the teacher ships the whole vocabulary and not in order")


def _refuse_non_finite(name: str, finite: Tensor) -> None:
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
