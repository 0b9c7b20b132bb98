"""LLKD's gates and weights: its testable properties, and running means.

N positions   D domains
"""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from shared.config.weighting import LLKD
from student_trainer.losses.kernel.top1 import Top1
from student_trainer.weighing.llkd import LLKDWeighting
from student_trainer.weighing.weighting import PositionWeights, RunningMeans, Seen, StepMeans

VOCABULARY, DOMAINS, N = 64, 3, 4000


def seen_of(seed: int, *, num: int = N) -> Seen:
    """Teacher and student at random positions of documents of 5 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    place_N = torch.arange(num)
    confidence_N = torch.rand(num, generator=generator) ** (1 + place_N // 5 % DOMAINS)
    return Seen(
        label_logprob_N=confidence_N.log(),
        captured_mass=lambda: None,
        entropy_N=None,
        student={"entropy": math.log(VOCABULARY) * torch.rand(num, generator=generator)},
        domain_N=place_N // 5 % DOMAINS,
        document_N=place_N // 5,
        vocabulary=VOCABULARY,
    )


def signals(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """c and u, straight from what the teacher shipped and the student said."""
    confidence_N = np.exp(seen.label_logprob_N.double().numpy())
    return confidence_N, seen.student["entropy"].double().numpy() / math.log(VOCABULARY)


def by_document(seen: Seen, value_N: torch.Tensor) -> np.ndarray:
    """The means of runs of 5 positions."""
    return np.repeat(value_N.double().numpy().reshape(-1, 5).mean(1), 5)


def follow(weighting: LLKDWeighting, seen: Seen, found: PositionWeights) -> None:
    """Tell the weighting what it reported of a step."""
    domain_N = seen.domain_N.numpy()
    reported = {"mean_weight": found.taught_N, **found.reports}
    sums = {
        name: np.bincount(domain_N, weights=value_N.numpy(), minlength=DOMAINS)
        for name, value_N in reported.items()
    }
    tokens_D = np.bincount(domain_N, minlength=DOMAINS)
    weighting.follow(StepMeans(sums, tokens_D, step=2))


def after(steps: int, section: LLKD, **options: int) -> LLKDWeighting:
    """A weighting that has seen steps."""
    weighting = LLKDWeighting(section, num_domains=DOMAINS)
    for seed in range(steps):
        seen = seen_of(seed, **options)
        follow(weighting, seen, weighting.weights(seen))
    return weighting


def test_the_first_step_learns_everything_weighted_by_both_signals():
    seen = seen_of(0)
    found = after(0, LLKD()).weights(seen)
    confidence_N, uncertainty_N = signals(seen)
    np.testing.assert_allclose(found.taught_N, confidence_N * uncertainty_N, rtol=1e-12)
    assert torch.equal(found.taught_N, found.text_N)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("unit", ["token", "document"])
@pytest.mark.parametrize("by", ["auto", "domain", "none"])
@pytest.mark.parametrize(("confidence", "uncertainty"), [(1.0, 1.0), (0.5, 1.2), (0.0, 0.8)])
def test_what_is_learnt_and_what_it_counts_follow_the_equations(
    decay: float, unit: str, by: str, confidence: float, uncertainty: float
) -> None:
    """A second and a third step, whose thresholds are means of the ones before."""
    section = LLKD.model_validate(
        {
            "decay": decay,
            "unit": unit,
            "by": by,
            "confidence": confidence,
            "uncertainty": uncertainty,
        }
    )
    weighting, means, mean_weight = LLKDWeighting(section, num_domains=DOMAINS), [], [1.0]
    for seed in range(3):
        seen = seen_of(seed)
        found, domain_N = weighting.weights(seen), seen.domain_N.numpy()
        confidence_N, uncertainty_N = signals(seen)
        if unit == "document":
            confidence_N = np.exp(by_document(seen, seen.label_logprob_N))
            uncertainty_N = by_document(seen, seen.student["entropy"]) / math.log(VOCABULARY)
        learnt_N = np.ones(N, bool)
        ages = decay ** np.arange(len(means))[::-1]
        pairs = enumerate(((confidence_N, confidence), (uncertainty_N, uncertainty)))
        for place, (value_N, scale) in pairs if means else ():
            of_steps = np.array([one[place] for one in means])
            overall, of_domain = (
                np.average(of_steps[..., part], axis=0, weights=ages)
                for part in (DOMAINS, slice(0, DOMAINS))
            )
            share = of_domain / of_domain.max() if by != "none" else np.ones(DOMAINS)
            learnt_N &= value_N >= scale * overall * share[domain_N]
        raw_N = np.where(learnt_N, confidence_N * uncertainty_N, 0)
        m = np.average(mean_weight[1:], weights=ages) if means else 1.0
        np.testing.assert_allclose(found.taught_N, raw_N / m, rtol=1e-9)
        mean_weight.append(raw_N.mean())
        means.append(
            [
                [*(value_N[domain_N == d].mean() for d in range(DOMAINS)), value_N.mean()]
                for value_N in (confidence_N, uncertainty_N)
            ]
        )
        follow(weighting, seen, found)
    assert bool(0 < learnt_N.mean() < 1) == bool(confidence or uncertainty)


def test_without_gates_everything_is_learnt_by_weights_of_mean_one():
    section = LLKD(confidence=0, uncertainty=0)
    weighting = after(5, section)
    weight_N = weighting.weights(seen_of(9)).taught_N
    assert (weight_N > 0).all()
    assert weight_N.mean().item() == pytest.approx(1, abs=0.05)
    assert weighting.confidence_thresholds().tolist() == [0.0] * DOMAINS


def test_the_domain_of_the_largest_mean_has_the_global_threshold_itself():
    weighting = after(3, LLKD(confidence=0.7))
    overall = weighting._means["teacher_confidence"].values[-1]
    assert weighting.confidence_thresholds().max() == 0.7 * overall
    assert weighting.confidence_thresholds().argmax() == 0  # where its probabilities are largest
    flat = after(3, LLKD(confidence=0.7, by="none")).confidence_thresholds()
    assert flat.tolist() == [0.7 * overall] * DOMAINS


CLASSES = 4


def classified(seed: int, *, num: int = 400) -> Seen:
    """Rows whose teacher thinks one of some classes likeliest, the last of them never."""
    generator = torch.Generator().manual_seed(seed)
    class_N = torch.randint(CLASSES - 1, (num,), generator=generator)
    confidence_N = (0.3 + 0.2 * class_N + 0.1 * torch.rand(num, generator=generator)).double()
    top = Top1(confidence_N, torch.zeros(num, dtype=torch.bool), class_N)
    return replace(seen_of(seed, num=num), teacher_top1=lambda: top, vocabulary=CLASSES)


def follow_classes(weighting: LLKDWeighting, seen: Seen) -> np.ndarray:
    """Tell the weighting of a step, as its sums have it; returns those by class, [4, C]."""
    found = weighting.weights(seen)
    assert found.policy_F is not None
    sums = {name: np.zeros(DOMAINS) for name in (*weighting.reported, "mean_weight")}
    tokens_D = np.bincount(seen.domain_N, minlength=DOMAINS)
    weighting.follow(StepMeans(sums, tokens_D, 1, found.policy_F.numpy()))
    return found.policy_F.numpy().reshape(4, CLASSES)


def test_rows_have_the_thresholds_of_the_class_that_the_teacher_thinks_likeliest():
    section = LLKD(confidence=0.9, uncertainty=0.7, decay=0.0)
    weighting = LLKDWeighting(section, num_domains=DOMAINS, num_classes=CLASSES)
    seen = classified(0)
    top = seen.teacher_top1()
    assert top is not None
    follow_classes(weighting, seen)
    confidence_N, class_N = top.confidence_N.numpy(), top.id_N.numpy()
    uncertainty_N = seen.student["entropy"].double().numpy() / math.log(CLASSES)
    wanted = []
    for value_N, scale, found in (
        (confidence_N, 0.9, weighting.confidence_thresholds()),
        (uncertainty_N, 0.7, weighting.uncertainty_thresholds()),
    ):
        mean_C = np.array([value_N[class_N == c].mean() for c in range(CLASSES - 1)] + [0.0])
        threshold_C = scale * value_N.mean() * mean_C / mean_C.max()
        np.testing.assert_allclose(found, threshold_C, rtol=1e-12)
        assert found.max() == pytest.approx(scale * value_N.mean(), rel=1e-15)
        wanted.append(value_N >= threshold_C[class_N])
    learnt_N = weighting.weights(seen).taught_N.numpy() > 0
    assert np.array_equal(learnt_N, wanted[0] & wanted[1])
    assert 0 < learnt_N.mean() < 1
    *_, rows_C, selected_C = follow_classes(weighting, seen)
    assert rows_C.tolist() == np.bincount(class_N, minlength=CLASSES).tolist()
    assert selected_C.tolist() == np.bincount(class_N[learnt_N], minlength=CLASSES).tolist()


def test_a_weight_is_never_negative_and_grows_with_both_signals():
    weighting, seen = after(3, LLKD()), seen_of(9)
    weight_N, (confidence_N, uncertainty_N) = weighting.weights(seen).taught_N, signals(seen)
    assert (weight_N >= 0).all()
    learnt = np.flatnonzero(weight_N.numpy())
    ratio = weight_N.numpy()[learnt] / (confidence_N * uncertainty_N)[learnt]
    assert ratio.max() == pytest.approx(ratio.min(), rel=1e-9)
    assert ratio.min() > 0


def test_a_document_is_learnt_whole_or_not_at_all():
    weighting, seen = after(3, LLKD(unit="document")), seen_of(9)
    learnt = (weighting.weights(seen).taught_N != 0).reshape(-1, 5)
    assert torch.equal(learnt.all(1), learnt.any(1))
    assert 0 < learnt.all(1).float().mean() < 1


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_what_is_formed_of_a_step_does_not_depend_on_how_it_is_cut(cut: int):
    weighting, seen = after(3, LLKD(unit="document")), seen_of(9)
    whole = weighting.weights(seen).taught_N
    edges = np.linspace(0, N // 5, cut + 1).astype(int) * 5
    parts = [
        weighting.weights(
            Seen(
                seen.label_logprob_N[start:stop],
                None,
                None,
                {"entropy": seen.student["entropy"][start:stop]},
                seen.domain_N[start:stop],
                seen.document_N[start:stop] - seen.document_N[start],
                VOCABULARY,
            )
        ).taught_N
        for start, stop in pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_an_answer_that_is_no_number_is_not_left_out():
    """It must end the run, not go by unseen."""
    weighting, seen = after(3, LLKD()), seen_of(9)
    seen.label_logprob_N[3] = torch.nan
    seen.student["entropy"][7] = torch.nan
    broken = weighting.weights(seen).taught_N.isnan()
    assert broken.sum() == 2
    assert broken[3]
    assert broken[7]


def test_an_empty_unit_has_no_weights():
    assert len(after(2, LLKD(unit="document")).weights(seen_of(0, num=0)).taught_N) == 0


def test_a_state_survives_json_bit_for_bit():
    weighting, again = after(4, LLKD()), LLKDWeighting(LLKD(), num_domains=DOMAINS)
    again.restore(json.loads(json.dumps(weighting.state())))
    assert again.state() == weighting.state()
    seen = seen_of(9)
    assert torch.equal(again.weights(seen).taught_N, weighting.weights(seen).taught_N)
    assert not torch.equal(again.weights(seen).taught_N, after(3, LLKD()).weights(seen).taught_N)


def test_a_running_mean_begins_at_the_first_step_and_forgets_by_its_decay():
    means = RunningMeans(0.9, num_domains=2)
    assert np.isnan(means.values).all()
    means.follow(np.array([2.0, np.nan, 2.0]))
    np.testing.assert_allclose(means.values, [2.0, np.nan, 2.0])
    means.follow(np.array([4.0, 1.0, 3.0]))
    np.testing.assert_allclose(means.values, [(0.9 * 2 + 4) / 1.9, 1.0, (0.9 * 2 + 3) / 1.9])


def test_a_domain_without_tokens_keeps_its_mean():
    weighting = after(1, LLKD(confidence=1))
    before = weighting.confidence_thresholds() / weighting.confidence_thresholds().max()
    sums = {n: np.array([0.0, 6.0, 0.0]) for n in ("mean_weight", *LLKDWeighting.reported)}
    weighting.follow(StepMeans(sums, np.array([0, 10, 0]), step=2))
    found = weighting.confidence_thresholds()
    assert found[2] / found[0] == before[2] / before[0]
    assert found[1] != before[1]
