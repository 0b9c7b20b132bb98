"""What leaves a teacher's device is as narrow as what travels, and the answer has the same bits."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from shared.errors import TeacherError
from shared.soft_targets import SoftTargets, TargetArrays
from shared.target_spec import TargetSpec
from teacher_service.scoring import Selection
from teacher_service.shipping import to_host

# N positions   K ids   D width of the states
N, K, D, V = 40, 16, 12, 70_000


def selection(*, drawn: bool) -> Selection:
    """Of random logits; ids kept exactly are few where ids are drawn, and none at one position."""
    torch.manual_seed(0)
    logprobs_NV = (torch.randn(N, 300) * 8).log_softmax(1).sort(1, descending=True)[0]
    logprobs_NK, tail_N = logprobs_NV[:, :K].clone(), logprobs_NV[:, K:].logsumexp(1)
    logprobs_NK[3, -1] = -1e6  # below what a half holds
    if drawn:
        logprobs_NK[:, 5:] = -torch.inf
        logprobs_NK[1] = -torch.inf
        tail_N = logprobs_NV[:, 5:].logsumexp(1)
    return Selection(
        ids_NK=torch.rand(N, V).topk(K)[1],
        logprobs_NK=logprobs_NK,
        log_tail_NS=tail_N[:, None].clamp(max=0),
        label_logprob_N=logprobs_NV[:, 2],
        entropy_N=torch.rand(N) if drawn else None,
    )


def states() -> dict[int, torch.Tensor]:
    """Of two layers, with a large position and one of zeros."""
    states_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    states_ND[0] *= 1e4
    states_ND[1] = 0
    return {2: states_ND, 5: states_ND.double().sin()}


def answer(spec: TargetSpec, arrays: TargetArrays) -> SoftTargets:
    """One row of all positions."""
    return SoftTargets.build(
        spec=spec,
        teacher={},
        row_hashes=[bytes(16)],
        num_targets_R=np.array([N]),
        arrays=arrays,
    )


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("selector", ["top_k", "threshold"])
def test_an_answer_has_the_bits_of_one_that_the_host_narrowed(selector: str, encoding: str):
    drawn = selector == "threshold"
    spec = TargetSpec(K, V, selector=selector, encoding=encoding, entropy=drawn)  # type: ignore[arg-type]
    found = selection(drawn=drawn)
    if encoding == "int8" and not drawn:  # whose kept ids and tail have to sum to 1
        found.logprobs_NK[3, -1] = found.logprobs_NK[3, -2]
        found.log_tail_NS[:, 0] = torch.log1p(-found.logprobs_NK.double().exp().sum(1)).float()
    narrow = to_host(found, {}, spec)
    wide = replace(
        narrow, ids_NK=found.ids_NK.numpy(), logprobs_NK=found.logprobs_NK.float().numpy()
    )
    assert answer(spec, narrow).table.equals(answer(spec, wide).table)
    assert narrow.ids_NK.itemsize == 4
    assert narrow.logprobs_NK.itemsize == (2 if encoding == "fp16" else 4)


@pytest.mark.parametrize(("encoding", "size"), [("bf16", 2), ("int8", 1), ("fp32", 4)])
def test_states_leave_the_device_in_the_type_in_which_they_travel(encoding: str, size: int):
    spec = TargetSpec(K, V, hidden_layers=(2, 5), hidden_encoding=encoding)  # type: ignore[arg-type]
    sent = to_host(selection(drawn=False), states(), spec)
    built = answer(spec, sent)
    for layer in (2, 5):
        assert sent.hidden_ND[layer].itemsize == size
        values = built.table.schema.field(f"hidden_{layer}").type.value_type.value_type
        assert values == {1: pa.int8(), 2: pa.uint16(), 4: pa.float32()}[size]


def test_int8_states_are_within_half_a_step_of_each_positions_largest():
    spec = TargetSpec(K, V, hidden_layers=(2, 5), hidden_encoding="int8")
    got = answer(spec, to_host(selection(drawn=False), states(), spec)).arrays().hidden_ND
    for layer, states_ND in states().items():
        half_step_N1 = np.abs(states_ND.numpy()).max(axis=1, keepdims=True) / 127 / 2
        assert (np.abs(got[layer] - states_ND.numpy()) <= half_step_N1 * (1 + 1e-5)).all()


def test_a_probability_that_is_no_number_is_refused_after_it_was_narrowed():
    for bad in (torch.nan, torch.inf, -torch.inf):
        found = selection(drawn=False)
        found.logprobs_NK[4, 2] = bad
        with pytest.raises(TeacherError, match="non-finite logprobs"):
            answer(TargetSpec(K, V), to_host(found, {}, TargetSpec(K, V)))
