"""The recomputing reference against dense float64."""

import pytest
import torch

from student_trainer.losses.kernel.primitive import (
    Head,
    chunks,
    default_chunk_rows,
    gathered_log_softmax,
)
from tests.allocations import largest_tensor
from tests.student_trainer.losses.dense import Case, gradients, tail_of

OPTIONS = [
    {},
    {"bias": True},
    {"soft_cap": 3.0},
    {"logit_scale": 0.3},
    {"bias": True, "logit_scale": 1.7, "soft_cap": 5.0},
]


def selection(case: Case, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's top k and then the label, which is not kept."""
    ids_NM = torch.cat([case.targets(k).ids_NK, case.label_N[:, None]], 1)
    kept_NM = torch.ones_like(ids_NM, dtype=torch.bool)
    kept_NM[:, -1] = False
    return ids_NM, kept_NM


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
def test_log_probabilities_and_their_gradients_equal_the_dense_ones(options, chunk_rows):
    case, temperatures = Case.random(**options), (1.0, 0.5, 4.0)
    ids_NM, kept_NM = selection(case, 8)
    log_q, log_tail = gathered_log_softmax(
        case.hidden_ND,
        case.head,
        ids_NM=ids_NM,
        kept_NM=kept_NM,
        temperatures=temperatures,
        chunk_rows=chunk_rows,
    )
    dense = [(case.head.logits(case.hidden_ND) / t).log_softmax(-1) for t in temperatures]
    expected_q = torch.stack([z.gather(1, ids_NM) for z in dense])
    expected_tail = torch.stack([tail_of(z, ids_NM[:, :8]) for z in dense])
    torch.testing.assert_close(log_q, expected_q, atol=1e-11, rtol=0)
    torch.testing.assert_close(log_tail, expected_tail, atol=1e-11, rtol=0)
    torch.manual_seed(0)
    slope_q, slope_tail = torch.randn_like(log_q), torch.randn_like(log_tail)
    found = gradients((log_q * slope_q).sum() + (log_tail * slope_tail).sum(), case)
    expected = gradients((expected_q * slope_q).sum() + (expected_tail * slope_tail).sum(), case)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_the_tail_of_a_peaked_token_is_exact_in_float32():
    head = Head(torch.eye(40))
    hidden_ND = torch.full((1, 40), -20.0)
    hidden_ND[0, 0] = 20.0
    _, log_tail = gathered_log_softmax(
        hidden_ND,
        head,
        ids_NM=torch.tensor([[0]]),
        kept_NM=torch.ones(1, 1, dtype=torch.bool),
    )
    expected = tail_of(hidden_ND.double().log_softmax(-1), torch.tensor([[0]]))
    assert log_tail.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() < -36


def test_keeping_every_id_leaves_no_tail_and_no_gradient_through_it():
    case = Case.random(5, vocabulary=11)
    ids_NM, kept_NM = selection(case, 11)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return gathered_log_softmax(case.hidden_ND, case.head, ids_NM=ids_NM, kept_NM=kept_NM)

    log_q, log_tail = both()
    assert torch.equal(log_tail, torch.full((1, 5), -torch.inf, dtype=torch.float64))
    found = gradients(log_q[..., 0].sum() + log_tail.sum(), case)
    expected = gradients(both()[0][..., 0].sum(), case)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_no_positions_give_empty_answers_connected_to_the_graph():
    case = Case.random(0)
    log_q, log_tail = gathered_log_softmax(
        case.hidden_ND,
        case.head,
        ids_NM=torch.zeros(0, 3, dtype=torch.int64),
        kept_NM=torch.zeros(0, 3, dtype=torch.bool),
        temperatures=(1.0, 2.0),
    )
    assert log_q.shape == (2, 0, 3)
    assert log_tail.shape == (2, 0)
    assert all((g == 0).all() for g in gradients(log_q.sum() + log_tail.sum(), case))


def test_the_reference_allocates_nothing_of_positions_times_vocabulary():
    case = Case.random(64, width=8, vocabulary=500, kind=torch.float32)
    ids_NM, kept_NM = selection(case, 4)

    def call() -> None:
        log_q, _ = gathered_log_softmax(
            case.hidden_ND, case.head, ids_NM=ids_NM, kept_NM=kept_NM, chunk_rows=16
        )
        log_q.sum().backward()

    assert largest_tensor(call) == 16 * 500


def test_chunks_cover_all_rows_in_nearly_equal_parts():
    for num_rows, limit in [(1, 5), (5, 5), (6, 5), (513, 256), (1000, 7)]:
        parts = list(chunks(num_rows, rows_per_chunk=limit))
        sizes = [part.stop - part.start for part in parts]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(num_rows))
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1


def test_the_default_chunk_shrinks_with_the_vocabulary_and_the_selection():
    small, large = (default_chunk_rows(v, num_ids=65) for v in (1_000, 151_936))
    assert small > 10_000
    assert large == 256
    assert default_chunk_rows(32_768, num_ids=32_769) < 64
