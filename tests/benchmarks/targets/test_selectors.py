"""The benchmark of selectors runs, and drawing beats ranking and fitting at equal bytes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.benchmarks.targets.approximated import BUDGET, DEFAULT, PolynomialTail
from tests.benchmarks.targets.scenes import (
    Scene,
    entropy,
    read_pair,
    reference_models,
    synthetic_scene,
)
from tests.benchmarks.targets.selectors import (
    POLYNOMIALS,
    Choice,
    Result,
    gradients,
    measure,
    print_table,
)

AGAINST = (Choice("threshold", 48, "int8"), Choice("threshold", 160, "int8"))  # either preset


def small_scene(num: int) -> Scene:
    """Random states and heads, 300 ids."""
    torch.manual_seed(0)
    student_ND = torch.randn(num, 8)
    return Scene(
        teacher_NV=torch.randn(num, 16) @ torch.randn(16, 300),
        student_NV=student_ND @ torch.randn(8, 300),
        student_ND=student_ND,
        label_N=torch.arange(num),
    )


def test_it_runs_and_everything_kept_has_no_angle(capsys) -> None:
    choices = [Choice("top_k", 300), Choice("threshold", 300), Choice("threshold", 16, "int8")]
    choices += [Choice("renormalised", 16), *POLYNOMIALS]
    found = list(measure(small_scene(80), choices, tokens=(20, 80), draws=2))
    assert len(found) == 2 * len(choices)
    whole = [result for result in found if result.choice.size == 300]
    assert max(result.angle for result in whole) < 0.1
    assert all(result.norm == pytest.approx(1, abs=1e-3) for result in whole)
    print_table(found)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(choices)


def test_the_whole_gradient_is_that_of_a_dense_computation() -> None:
    scene = small_scene(80)
    p_NV, q_NV = (x.double().softmax(1) for x in (scene.teacher_NV, scene.student_NV))
    dense_NV = q_NV - p_NV
    found = gradients(scene, Choice("whole", 300), seed=0, tokens=(30, 80)).grads_VD
    for num, grad_VD in zip((30, 80), found, strict=True):
        wanted_VD = dense_NV[:num].T @ scene.student_ND[:num].double()
        assert torch.allclose(grad_VD.double(), wanted_VD, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "vocab", "num_bytes"),
    [
        (BUDGET, 151_936, 127),
        (BUDGET, 128_256, 121),
        (BUDGET, 65_536, 114),
        (DEFAULT, 151_936, 344),
        (DEFAULT, 128_256, 328),
        (DEFAULT, 65_536, 312),
    ],
)
def test_a_polynomial_tail_costs_what_is_published(
    preset: PolynomialTail, vocab: int, num_bytes: int
) -> None:
    assert preset.num_bytes(vocab) == num_bytes


def test_a_polynomial_tail_restores_what_its_basis_holds() -> None:
    rank = torch.arange(400, dtype=torch.float64)
    logits_NV = torch.stack([-0.2 * rank, -1.5 * rank.sqrt() - 0.01 * rank]).float()
    logits_NV = logits_NV[:, torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    log_p_NV = logits_NV.log_softmax(1)
    for preset in (PolynomialTail(50, 0, (0, 1, 0.5)), PolynomialTail(40, 5, (0, 1))):
        ids_NK, logprobs_NK = preset.fit(logits_NV)
        assert torch.equal(ids_NK, log_p_NV.topk(preset.top_k).indices)
        wanted_NK = log_p_NV.gather(1, ids_NK)
        assert torch.allclose(
            logprobs_NK[0, preset.exact :], wanted_NK[0, preset.exact :], atol=1e-4
        )
        bfloat16 = wanted_NK[:, : preset.exact].bfloat16().float()
        assert torch.equal(logprobs_NK[:, : preset.exact], bfloat16)


def test_a_synthetic_pair_keeps_what_a_real_one_says() -> None:
    real = small_scene(60)
    made = synthetic_scene(real, num=60, vocab=2000)
    chosen = real.take(torch.randperm(60, generator=torch.Generator().manual_seed(0)))
    assert abs(float(entropy(made.teacher_NV).mean() - entropy(real.teacher_NV).mean())) < 0.01
    assert torch.equal(made.student_ND, chosen.student_ND)
    old, new = chosen.teacher_NV.log_softmax(1), made.teacher_NV
    order, place = (x.argsort(1, descending=True)[:, :150] for x in (old, new))
    # one temperature: all differences between ranks, and to the student, by the same factor
    factors = new.gather(1, place) / old.gather(1, order)
    assert torch.allclose(factors, factors[:1, :1].expand_as(factors), rtol=1e-4)
    student = made.student_NV.gather(1, place)
    wanted = chosen.student_NV.log_softmax(1).gather(1, order) * factors[0, 0]
    assert torch.allclose(student, wanted, rtol=1e-4)
    renamed = torch.full((300,), -1)  # an id of the first half is the same wherever it is
    for ids, names in zip(order, place, strict=True):
        known = renamed[ids] >= 0
        assert torch.equal(renamed[ids][known], names[known])
        renamed[ids] = names


def find(found: Sequence[Result], tokens: int) -> dict[Choice, Result]:
    """Results after so many tokens."""
    return {result.choice: result for result in found if result.tokens == tokens}


@pytest.mark.benchmark
def test_threshold_is_nearer_than_anything_that_costs_as_much(
    reference: Path, tmp_path: Path
) -> None:
    choices = [Choice("renormalised", 32), Choice("top_k", 32), Choice("top_k", 64)]
    choices += [Choice("sampled", 50), *(Choice("threshold", size) for size in (32, 48, 64))]
    scene = read_pair(reference, tmp_path, reference_models(reference), rows=2).scene.shuffled()
    measured = list(measure(scene, choices, tokens=(512, 2048), draws=4))
    few, many = find(measured, 512), find(measured, 2048)
    for cheap, dear in ((32, ("sampled", 50)), (48, ("top_k", 32)), (64, ("top_k", 64))):
        one, other = many[Choice("threshold", cheap)], many[Choice(*dear)]
        assert one.num_bytes < 1.1 * other.num_bytes
        assert one.angle < 0.7 * other.angle
    for size in (32, 48, 64):  # variance averages out, bias does not
        choice = Choice("threshold", size)
        assert many[choice].angle < 0.8 * few[choice].angle
    for choice in choices[:3]:
        assert many[choice].angle > few[choice].angle


def refuse_farther_than_a_fit(scene: Scene, *, draws: int) -> None:
    """At no more bytes than either preset, threshold has the smaller angle, whichever way the
    preset's students take the mass outside."""
    num = len(scene.label_N)
    found = find(list(measure(scene, [*AGAINST, *POLYNOMIALS], tokens=(num,), draws=draws)), num)
    for preset, choice in zip((BUDGET, DEFAULT), AGAINST, strict=True):
        assert found[choice].num_bytes <= preset.num_bytes(scene.vocab), found[choice]
        for fit in (c for c in POLYNOMIALS if c.size == preset.top_k):
            assert found[choice].angle < found[fit].angle, (found[choice], found[fit])


@pytest.mark.benchmark
def test_threshold_is_nearer_than_a_polynomial_tail_of_4_k_ids(
    reference: Path, tmp_path: Path
) -> None:
    scene = read_pair(reference, tmp_path, reference_models(reference), rows=2).scene
    refuse_farther_than_a_fit(scene.shuffled(), draws=2)


@pytest.mark.benchmark
def test_threshold_is_nearer_than_a_polynomial_tail_of_the_widest_vocabulary_of_this_text(
    reference: Path, tmp_path: Path, wide_models: dict[str, Path]
) -> None:
    scene = read_pair(reference, tmp_path, wide_models, rows=2).scene
    assert scene.vocab >= 32_000
    refuse_farther_than_a_fit(scene.shuffled(1024), draws=2)


@pytest.mark.benchmark
def test_threshold_is_nearer_than_a_polynomial_tail_of_152_k_ids(
    reference: Path, tmp_path: Path
) -> None:
    real = read_pair(reference, tmp_path, reference_models(reference), rows=2).scene
    refuse_farther_than_a_fit(synthetic_scene(real, num=1024), draws=2)
