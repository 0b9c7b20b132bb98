"""Token temperatures: golden values, dense float64, what a level takes no part in, and its limits.

N positions   V vocabulary   K ids kept per position
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config.losses import TokenTemperature
from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.terms.token_temperature import Hellinger, hellinger
from student_trainer.losses.token_losses import token_losses
from student_trainer.weighing.token_temperature import StepDistances
from tests.student_trainer.losses.dense import Case, gradients, relative_error, tail_of

F64 = torch.float64
FIVE = ([0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.3, 0.2, 0.1, 0.1])
BOTH = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])


def columns(case: Case, *, levels: int = 5) -> dict[str, Tensor]:
    """Levels in turn; every third position is not learnt."""
    place_N = torch.arange(len(case.label_N))
    weight_N = torch.where(place_N % 3 == 0, 0.0, 1.5).double()
    return {"level_N": place_N % levels, "level_weight_N": weight_N}


def merged(log_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The kept ids and the tail; all ids where all are kept."""
    kept_NK = log_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == log_NV.shape[1]:
        return kept_NK
    return torch.cat([kept_NK, tail_of(log_NV, ids_NK)[:, None]], 1)


def dense(case: Case, k: int, section: TokenTemperature) -> Tensor:
    """The values [N] from whole logits, each position at its own temperature."""
    found = columns(case, levels=section.levels)
    tau_N1 = torch.tensor(section.temperatures, dtype=F64)[found["level_N"]][:, None]
    ids_NK = case.teacher_NV.topk(k).indices
    logits = (case.teacher_NV, case.head.logits(case.hidden_ND))
    p, q = (merged((z / tau_N1).log_softmax(-1), ids_NK) for z in logits)
    if section.divergence == "reverse_kl":
        p, q = q, p
    return found["level_weight_N"] * tau_N1[:, 0] ** 2 * (p.exp() * (p - q)).sum(-1)


@BOTH
@pytest.mark.parametrize("k", [1, 8, 100, 101])
def test_loss_and_gradients_equal_dense_float64(divergence: str, k: int) -> None:
    section = TokenTemperature(divergence=divergence, strength=0.7, weight=0.3)  # type: ignore[arg-type]
    case = Case.random(bias=True, soft_cap=6.0)
    temperatures = tuple(sorted(section.temperatures))
    targets = case.targets(k, temperatures=temperatures)
    given = {"targets": targets, "columns": columns(case), "multiplier": 0.1, "chunk_rows": 10}
    found = case.losses(terms=[section], **given)
    expected_N = dense(case, k, section)
    torch.testing.assert_close(found.terms["token_temperature"], expected_N.detach())
    pairs = zip(gradients(found.loss, case), gradients(0.03 * expected_N.sum(), case), strict=True)
    assert all(relative_error(*pair) < 1e-6 for pair in pairs)


@BOTH
def test_on_the_teachers_states_it_is_exact(divergence: str) -> None:
    section = TokenTemperature(divergence=divergence)  # type: ignore[arg-type]
    case = Case.random()
    generator = torch.Generator().manual_seed(5)
    hidden_NE = torch.randn(37, 24, generator=generator, dtype=F64)
    head = Head(torch.randn(101, 24, generator=generator, dtype=F64))
    case = replace(case, teacher_NV=head.logits(hidden_NE))
    states = TeacherStates(hidden_NE, TeacherHead(head, 101))
    found = case.losses(terms=[section], targets=states, columns=columns(case))
    expected_N = dense(case, 101, section)
    torch.testing.assert_close(found.terms["token_temperature"], expected_N.detach())
    pairs = zip(gradients(found.loss, case), gradients(expected_N.sum(), case), strict=True)
    assert all(relative_error(*pair) < 1e-9 for pair in pairs)


def test_equal_distributions_have_neither_a_value_nor_a_gradient() -> None:
    case = Case.random()
    case = replace(case, teacher_NV=case.head.logits(case.hidden_ND).detach())
    section = TokenTemperature()
    targets = case.targets(8, temperatures=section.temperatures)
    found = case.losses(terms=[section], targets=targets, columns=columns(case))
    assert found.terms["token_temperature"].abs().max() < 1e-12
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients(found.loss, case))


def test_the_distance_has_its_golden_value_and_is_bounded_by_that_of_more_ids() -> None:
    p, q = (torch.tensor([x], dtype=F64).log() for x in FIVE)
    nothing = torch.full((1,), -torch.inf, dtype=F64)
    whole = hellinger(Buckets(p, nothing), Buckets(q, nothing)).item()
    squares = [(math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(*FIVE, strict=True)]
    expected = math.sqrt(sum(squares) / 2)
    assert whole == pytest.approx(expected, abs=1e-12) == pytest.approx(0.154392138, abs=1e-9)
    coarser = [
        hellinger(*(Buckets(x[:, :k], x[:, k:].logsumexp(-1)) for x in (p, q))).item()
        for k in (1, 2, 4, 5)
    ]
    assert coarser == sorted(coarser)
    assert coarser[-1] == pytest.approx(whole, abs=1e-12)
    apart = Buckets(torch.tensor([[0.0, -torch.inf]]), nothing.float())
    other = Buckets(torch.tensor([[-torch.inf, 0.0]]), nothing.float())
    assert hellinger(apart, other).item() == pytest.approx(1)
    assert hellinger(apart, apart).item() == 0


def test_the_look_is_the_distance_and_has_no_gradient() -> None:
    case = Case.random()
    with torch.no_grad():
        found = token_losses(
            case.hidden_ND,
            case.head,
            label_N=case.label_N,
            terms={"hellinger": Hellinger()},
            targets=case.targets(101),
        )
    p_NV, q_NV = (z.softmax(-1) for z in (case.teacher_NV, case.head.logits(case.hidden_ND)))
    expected_N = ((p_NV.sqrt() - q_NV.sqrt()).square().sum(-1) / 2).sqrt()
    torch.testing.assert_close(found.terms["hellinger"], expected_N.detach())
    assert not found.loss.requires_grad


@pytest.mark.parametrize("levels", [3, 5, 33])
def test_a_level_is_the_published_temperature_to_half_a_step(levels: int) -> None:
    section = TokenTemperature(strength=0.5, levels=levels)
    assert len(section.temperatures) == levels
    assert 1.0 in section.temperatures
    distance_N = np.random.default_rng(0).exponential(0.1, 101)
    step = StepDistances.of(distance_N, hardest=1.0)
    level_N = step.columns(distance_N, levels=levels)["level_N"]
    exact_N = np.exp(-0.5 * np.tanh(np.log(distance_N / np.median(distance_N))))
    found_N = np.array(section.temperatures)[level_N]
    assert np.abs(np.log(found_N / exact_N)).max() <= 0.5 / (levels - 1) + 1e-6
    assert found_N[distance_N.argmax()] < 1 < found_N[distance_N.argmin()]


@pytest.mark.parametrize(("hardest", "learnt"), [(1.0, 10), (0.7, 7), (0.35, 4), (0.01, 1)])
def test_the_hardest_share_is_learnt_and_the_mean_is_theirs(hardest: float, learnt: int) -> None:
    distance_N = np.random.default_rng(1).permutation(np.linspace(0.1, 0.9, 10))
    step = StepDistances.of(distance_N, hardest=hardest)
    found = step.columns(distance_N, levels=5)
    kept_N = found["level_weight_N"] > 0
    assert kept_N.sum() == learnt
    assert distance_N[kept_N].min() > distance_N[~kept_N].max(initial=0)
    value_N = np.arange(10.0)
    assert (found["level_weight_N"] * value_N).mean() == pytest.approx(value_N[kept_N].mean())
    assert step.median == sorted(distance_N[kept_N])[(learnt - 1) // 2]


def test_a_step_without_tokens_or_without_a_distance_is_at_temperature_one() -> None:
    nothing = np.zeros(0, np.float32)
    found = StepDistances.of(nothing, hardest=0.5).columns(nothing, levels=5)
    assert [len(column_N) for column_N in found.values()] == [0, 0]
    equal_N = np.zeros(3, np.float32)
    found = StepDistances.of(equal_N, hardest=0.5).columns(equal_N, levels=5)
    assert found["level_N"].tolist() == [2, 2, 2]
    assert found["level_weight_N"].tolist() == [1, 1, 1]
    mixed_N = np.array([0, 0, 0.1], np.float32)
    found = StepDistances.of(mixed_N, hardest=1.0).columns(mixed_N, levels=5)
    assert found["level_N"].tolist() == [2, 2, 0]


@pytest.mark.parametrize("hardest", [1.0, 0.5, 0.2])
def test_a_token_whose_distance_is_no_number_is_learnt_so_that_its_loss_ends_the_run(
    hardest: float,
) -> None:
    distance_N = np.array([0.1, 0.2, np.nan, 0.4, 0.3], np.float32)
    found = StepDistances.of(distance_N, hardest=hardest).columns(distance_N, levels=5)
    assert found["level_weight_N"][2] > 0
    assert found["level_N"][2] == 2


def test_an_even_number_of_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="levels of token_temperature are 4; take an odd number"):
        TokenTemperature(levels=4)
