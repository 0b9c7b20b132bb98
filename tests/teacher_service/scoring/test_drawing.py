"""Drawn ids: exact size, weights that sum to 1, no bias, and what no rounding may break.

N positions   V ids   K ids kept per position
"""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from shared.data.rows import Rows
from shared.targets.draws import uniforms
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead
from tests.allocations import largest_tensor
from tests.answers import decoded
from tests.drawn import dense_weights, drawn_answer, drawn_spec, draws_of, row_of


def zipf(num: int, vocab: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Logits [N, V] that fall with the rank as text's do, each id at a random rank."""
    draw_from = torch.Generator().manual_seed(seed)
    ranks_NV = torch.stack([torch.randperm(vocab, generator=draw_from) for _ in range(num)]) + 1
    noise_NV = torch.randn(num, vocab, generator=draw_from)
    return scale * (noise_NV - 1.1 * ranks_NV.log())


def head_of(p_V: np.ndarray, size: int) -> int:
    """The smallest h with p_(h+1) < T_h / (size - h), from its definition; `size` without one."""
    p_V = np.sort(p_V)[::-1]
    return next((h for h in range(size) if p_V[h] < p_V[h:].sum() / (size - h)), size)


@pytest.mark.parametrize("vocab", [3, 17, 300, 4096])
@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_exactly_n_ids_whose_weights_sum_to_one(
    vocab: int, scale: float, temperature: float
) -> None:
    logits_NV = zipf(40, vocab, scale=scale)
    p_NV = (logits_NV.double() / temperature).softmax(1).numpy()
    for size in {1, 2, min(vocab, 32), vocab - 1}:
        spec = drawn_spec("threshold", size, vocab, temperature=temperature)
        weights_NV = dense_weights(drawn_answer(logits_NV, spec)).numpy()
        np.testing.assert_allclose(weights_NV.sum(1), 1, rtol=0, atol=2e-6)
        assert ((weights_NV > 0).sum(1) <= size).all()
        plain_N = (p_NV > 1e-30).sum(1) > size  # far from where float32 ends
        assert ((weights_NV > 0).sum(1)[plain_N] == size).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_head_is_kept_exactly_and_the_rest_has_one_weight(temperature: float) -> None:
    size, vocab = 24, 500
    logits_NV = zipf(60, vocab, scale=3.0)
    p_NV = (logits_NV.double() / temperature).softmax(1).numpy()
    answer = drawn_answer(logits_NV, drawn_spec("threshold", size, vocab, temperature=temperature))
    weights_NV = dense_weights(answer).numpy()
    tails_N = np.exp(decoded(answer).log_tail_NS[:, 0].astype(np.float64))
    heads = set()
    for weights_V, p_V, tail in zip(weights_NV, p_NV, tails_N, strict=True):
        num_exact = head_of(p_V, size)
        order_V = np.argsort(-p_V)
        exact_V, rest_V = order_V[:num_exact], order_V[num_exact:]
        np.testing.assert_allclose(weights_V[exact_V], p_V[exact_V], rtol=5e-6)
        assert tail == pytest.approx(p_V[rest_V].sum(), rel=5e-6)
        drawn_V = weights_V[rest_V]
        np.testing.assert_allclose(drawn_V[drawn_V > 0], tail / (size - num_exact), rtol=1e-5)
        assert (drawn_V > 0).sum() == size - num_exact
        heads.add(num_exact)
    assert len(heads) > 3


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_weight_over_draws_is_the_probability(selector, temperature: float) -> None:
    vocab, count = 60, 3000
    logits_NV = zipf(6, vocab)
    p_NV = (logits_NV.double() / temperature).softmax(1)
    spec = drawn_spec(selector, 8, vocab, temperature=temperature, seed=1)
    answer = drawn_answer(logits_NV, spec, times=count)
    mean_NV = dense_weights(answer).reshape(count, *p_NV.shape).mean(0)
    variance_NV = p_NV * (1 - p_NV) / 8
    if selector == "threshold":
        sizes_N = torch.tensor([head_of(p_V.numpy(), 8) for p_V in p_NV])
        tail_N = torch.tensor(decoded(answer).log_tail_NS[:6, 0]).double().exp()
        weight_N1 = (tail_N / (8 - sizes_N))[:, None]
        variance_NV = (p_NV * (weight_N1 - p_NV)).clamp(min=0)
    error_NV = (variance_NV / count).sqrt()
    off_NV = (mean_NV - p_NV).abs()
    assert (off_NV <= 4 * error_NV + 1e-6).all()
    assert float((off_NV**2).sum() / (error_NV**2).sum()) == pytest.approx(1, abs=0.4)
    # Small enough to tell it from a draw that forgets to weight.
    assert float(error_NV.max()) < 0.005


def test_a_threshold_draw_varies_less_than_independent_ones() -> None:
    vocab = 200
    logits_NV = zipf(20, vocab)
    p_NV = logits_NV.double().softmax(1)

    def variance(selector) -> float:
        spec = drawn_spec(selector, 16, vocab)
        answers = list(draws_of(logits_NV, spec, count=50))
        return float(sum(((dense_weights(a) - p_NV) ** 2).sum() for a in answers))

    assert variance("threshold") < 0.5 * variance("sampled")


def test_the_draw_depends_on_the_seed_the_row_its_draw_and_the_position_alone() -> None:
    vocab, num = 300, 30
    logits_NV, rows = zipf(num, vocab), row_of(num)
    for selector in ("threshold", "sampled"):
        spec = drawn_spec(selector, 12, vocab)
        asked = drawn_answer(logits_NV, spec, rows=rows)
        again = drawn_answer(logits_NV, spec, rows=rows, chunk=16)
        assert asked.table.equals(again.table), "a retry, in other chunks"
        other = drawn_answer(logits_NV, spec, rows=rows.with_draws(np.array([1])))
        seeded = drawn_answer(logits_NV, drawn_spec(selector, 12, vocab, seed=1), rows=rows)
        for different in (other, seeded):
            assert (decoded(asked).ids_NK != decoded(different).ids_NK).any(1).mean() > 0.9


def test_uniform_numbers_know_no_neighbours() -> None:
    one, other = row_of(5), row_of(7)
    both = Rows(pa.concat_tables([other.table, one.table]))
    alone_NU = uniforms(one, seed=3, count=4)
    np.testing.assert_array_equal(uniforms(both, seed=3, count=4)[7:], alone_NU)
    np.testing.assert_array_equal(uniforms(both.part(slice(1, 2)), seed=3, count=4), alone_NU)
    many_N = uniforms(row_of(20_000), seed=0, count=1)[:, 0]
    assert 0 <= many_N.min() < 1e-3 < 1 - 1e-3 < many_N.max() < 1
    for power in (1, 2, 3):
        assert (many_N**power).mean() == pytest.approx(1 / (power + 1), abs=4 / math.sqrt(20_000))


NOTHING = -1e30  # a logit that rules an id out


def degenerate() -> dict[str, Tensor]:
    """Positions that sampling has trouble with, V = 40."""
    flat = torch.zeros(40)
    one_hot = torch.full((40,), NOTHING)
    one_hot[17] = 0
    few = torch.full((40,), NOTHING)
    few[[3, 30, 31]] = torch.tensor([0.0, -1.0, -2.0])
    peaked = torch.full((40,), -60.0)
    peaked[5] = 30
    steps = (torch.arange(40) // 8).float()  # ties of eight
    coarse = (torch.linspace(0, 40, 40)).bfloat16().float()  # as bfloat16 logits are
    huge = torch.linspace(0, 2000, 40)
    return {
        "flat": flat, "one_hot": one_hot, "few": few, "peaked": peaked,
        "steps": steps, "coarse": coarse, "huge": huge,
    }  # fmt: skip


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("size", [1, 2, 3, 8, 39, 40])
@pytest.mark.parametrize("encoding", ["fp32", "fp16", "int8"])
def test_degenerate_positions_keep_every_law(name: str, size: int, encoding: str) -> None:
    logits_V = degenerate()[name]
    p_V = logits_V.double().softmax(0)
    support = int((p_V > 1.2e-38).sum())
    spec = drawn_spec("threshold", size, 40, encoding=encoding)
    answer = drawn_answer(logits_V.expand(25, -1), spec)
    arrays, weights_NV = decoded(answer), dense_weights(answer)
    torch.testing.assert_close(
        weights_NV.sum(1), torch.ones(25, dtype=torch.float64), rtol=0, atol=2e-6
    )
    assert not np.isnan(arrays.logprobs_NK).any()
    assert (weights_NV[:, p_V < 1.1e-38] == 0).all()
    if support <= size:
        # int8 has 255 steps from the likeliest id to the least likely.
        step = float(p_V[p_V > 1.2e-38].log().diff().abs().sum()) / 255
        exact = {"fp32": 1e-6, "fp16": 1e-3, "int8": 1e-3 + step / 2}[encoding]
        torch.testing.assert_close(weights_NV, p_V.expand(25, -1), rtol=0, atol=exact)
        assert np.isneginf(arrays.log_tail_NS).all()
        assert (np.isneginf(arrays.logprobs_NK).sum(1) == size - support).all()
    else:
        assert ((weights_NV > 0).sum(1) == size).all()


def test_an_entropy_is_that_of_what_was_drawn_from() -> None:
    logits_NV = zipf(20, 100)
    for temperature, shared in ((1.0, 100), (3.0, 80)):
        spec = drawn_spec("threshold", 8, shared, temperature=temperature)
        log_p_NV = (logits_NV[:, :shared].double() / temperature).log_softmax(1)
        expected_N = -(log_p_NV.exp() * log_p_NV).sum(1)
        entropy_N = torch.tensor(drawn_answer(logits_NV, spec).arrays().entropy_N)
        torch.testing.assert_close(entropy_N.double(), expected_N, rtol=0, atol=5e-6)


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_what_no_student_shares_is_never_drawn_and_has_no_mass(selector) -> None:
    """Rows of the head beyond the shared ids, here likelier than all others."""
    logits_NV = zipf(30, 100)
    logits_NV[:, 80:] += 20
    answer = drawn_answer(logits_NV, drawn_spec(selector, 80, 80))
    weights_NV = dense_weights(answer)
    assert weights_NV.shape[1] == 80
    torch.testing.assert_close(weights_NV.sum(1), torch.ones(30).double(), rtol=0, atol=1e-6)
    if selector == "threshold":
        p_NV = logits_NV[:, :80].double().softmax(1)
        torch.testing.assert_close(weights_NV, p_NV, rtol=1e-5, atol=1e-9)


def test_the_tail_of_independent_draws_is_the_mass_of_what_was_not_drawn() -> None:
    logits_NV = zipf(30, 100)
    answer = drawn_answer(logits_NV, drawn_spec("sampled", 16, 100))
    undrawn_NV = dense_weights(answer) == 0
    expected_N = (logits_NV.double().softmax(1) * undrawn_NV).sum(1)
    found_N = torch.tensor(decoded(answer).log_tail_NS[:, 0]).double().exp()
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_least_and_the_largest_number_draw_nothing_without_mass(selector, uniform) -> None:
    size, num, vocab = 8, 20, 100
    logits_NV = zipf(num, vocab, scale=0.05)
    logits_NV[:, :20], logits_NV[:, 60:] = NOTHING, NOTHING
    found = draw(
        logits_NV,
        ScoringHead(torch.eye(vocab)),
        torch.full((num,), 30),
        uniform_NU=torch.full(
            (num, 1 if selector == "threshold" else size), uniform, dtype=torch.float64
        ),
        selector=selector,
        num_ids=size,
        shared_vocab=vocab,
    )
    assert ((found.ids_NK >= 20) & (found.ids_NK < 60)).all()
    if selector == "threshold":
        assert all(len(set(ids)) == size for ids in found.ids_NK.tolist())


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_no_tensor_of_positions_times_vocabulary_is_allocated(selector) -> None:
    hidden_ND, head = torch.randn(512, 16), ScoringHead(torch.randn(4000, 16))
    uniform_NU = torch.rand(512, 8, dtype=torch.float64)
    uniform_NU = uniform_NU if selector == "sampled" else uniform_NU[:, :1]
    largest = largest_tensor(
        lambda: draw(
            hidden_ND,
            head,
            torch.zeros(512).long(),
            uniform_NU=uniform_NU,
            selector=selector,
            num_ids=8,
            shared_vocab=3000,
            chunk=32,
        )
    )
    assert largest == 32 * 4000


def test_no_position_gives_empty_tensors() -> None:
    found = draw(
        torch.zeros(0, 16),
        ScoringHead(torch.randn(50, 16)),
        torch.zeros(0).long(),
        uniform_NU=torch.zeros(0, 1, dtype=torch.float64),
        selector="threshold",
        num_ids=8,
        shared_vocab=50,
    )
    assert found.ids_NK.shape == (0, 8)
