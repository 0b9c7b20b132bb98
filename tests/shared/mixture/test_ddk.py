"""DDK against the golden vectors and the laws of its two equations."""

from itertools import pairwise

import numpy as np
import pytest

from shared.errors import DataError, NonFiniteLossError
from shared.mixture.ddk import initial_factors, perplexity_ratios, updated_factors
from shared.mixture.weight_log import DomainReport

TEN = ((12, 8), (9, 7), (7, 6), (20, 11), (15, 9), (6, 5), (11, 8), (8, 6.5), (10, 8), (5, 4.2))


def _report(student, teacher, *, tokens=None, step: int = 0) -> DomainReport:
    """A report of the given perplexities."""
    tokens = tokens or [100 + 7 * i for i in range(len(student))]
    nll_sums = np.log(np.array(student, float)) * tokens
    return DomainReport(
        step=step,
        student_nll_sums=tuple(nll_sums.tolist()),
        num_tokens=tuple(tokens),
        teacher_nlls=tuple(np.log(np.array(teacher, float)).tolist()),
    )


def _names(count: int) -> list[str]:
    return [f"d{i}" for i in range(count)]


def _first(report: DomainReport) -> np.ndarray:
    return np.array(initial_factors(report, domains=_names(len(report.num_tokens))))


def _next(r, report: DomainReport, *, alpha: float = 0.5) -> np.ndarray:
    names = _names(len(report.num_tokens))
    return np.array(updated_factors(tuple(r), report, alpha=alpha, domains=names))


def _random(rng: np.random.Generator, count: int) -> DomainReport:
    teacher = rng.uniform(3, 20, count)
    return _report(teacher * rng.uniform(0.9, 4, count), teacher)


def test_both_equations_meet_the_golden_vectors() -> None:
    report = _report([12, 9, 6], [8, 8, 5])
    np.testing.assert_allclose(_first(report), [0.411843, 0.283056, 0.305101], atol=5e-7)
    np.testing.assert_allclose(
        _next([0.5, 0.3, 0.2], report), [0.459287, 0.287335, 0.253378], atol=5e-7
    )


def test_factors_sum_to_one_between_floor_and_ceiling() -> None:
    rng = np.random.default_rng(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        r = _first(_random(rng, 10))
        for _ in range(50):
            r = _next(r, _random(rng, 10), alpha=alpha)
            assert abs(r.sum() - 1) < 1e-12
            assert r.min() >= (1 - alpha) / 10 - 1e-15
            assert r.max() <= alpha + (1 - alpha) / 10 + 1e-15


def test_equal_ratios_shrink_the_distance_to_uniform_by_alpha() -> None:
    r0 = _first(_report([12, 9, 6], [8, 8, 5]))
    r, equal = r0, _report([12, 9, 6], [8, 6, 4])
    for t in range(1, 20):
        r = _next(r, equal, alpha=0.7)
        np.testing.assert_allclose(r - 1 / 3, 0.7**t * (r0 - 1 / 3), rtol=0, atol=1e-14)


def test_a_constant_on_all_ratios_or_a_factor_on_all_perplexities_changes_nothing() -> None:
    student, teacher = np.array([12.0, 9, 6]), np.array([8.0, 8, 5])
    plain, r = _report(student, teacher), [0.5, 0.3, 0.2]
    for other in (_report(student + 3.7 * teacher, teacher), _report(student * 9, teacher * 9)):
        np.testing.assert_allclose(_first(other), _first(plain), atol=1e-12)
        np.testing.assert_allclose(_next(r, other), _next(r, plain), atol=1e-12)


def test_from_uniform_with_alpha_one_the_update_is_the_initial_factor() -> None:
    report = _random(np.random.default_rng(1), 7)
    np.testing.assert_allclose(
        _next([1 / 7] * 7, report, alpha=1.0), _first(report), rtol=0, atol=1e-15
    )


def test_the_worked_fixed_point_is_reached() -> None:
    report = _report(*zip(*TEN, strict=True))
    r = _first(report)
    for _ in range(200):
        r = _next(r, report)
    expected = [0.1045, 0.0863, 0.0798, 0.1766, 0.1303, 0.0815, 0.0926, 0.0831, 0.0842, 0.0810]
    np.testing.assert_allclose(r, expected, atol=6e-5)
    np.testing.assert_allclose(_next(r, report), r, atol=1e-12)


def test_where_one_domain_is_mastered_the_others_share_rises_to_its_ceiling() -> None:
    r = _first(_report([20, 20], [10, 10]))
    shares = [r[1]]
    for _ in range(20):
        r = _next(r, _report([10, 20], [10, 10]))
        shares.append(r[1])
    assert shares[0] == pytest.approx(0.5)
    assert all(b > a for a, b in pairwise(shares[:9]))
    assert 0.6 < shares[-1] < 0.75


def test_perplexities_are_token_means_of_the_sums() -> None:
    report = DomainReport(0, (30.0, 8.0), (10, 4), (1.0, 1.5))
    np.testing.assert_allclose(
        perplexity_ratios(report, domains=["a", "b"]), [np.exp(2.0), np.exp(0.5)], rtol=1e-14
    )


def test_an_untrained_student_overflows_nothing() -> None:
    report = _report([1e300, 1e300, 5e4], [2, 3, 4])
    r = _first(report)
    assert r.tolist() == [1.0, 0.0, 0.0]
    with np.errstate(all="raise", divide="ignore", under="ignore"):
        later = _next(r, _report([1e6, 1e7, 10], [2, 3, 4]))
    np.testing.assert_allclose(later, [0.5 + 1 / 6, 1 / 6, 1 / 6])


def test_a_domain_without_validation_tokens_gets_nothing_and_the_rest_is_renormalised() -> None:
    with_empty = _report([12, 9, 6, 1], [8, 8, 5, 1], tokens=[10, 20, 30, 0])
    with_empty = DomainReport(
        0,
        with_empty.student_nll_sums,
        with_empty.num_tokens,
        (*with_empty.teacher_nlls[:3], np.nan),
    )
    full = _report([12, 9, 6], [8, 8, 5])
    np.testing.assert_allclose(_first(with_empty), [*_first(full), 0], atol=1e-15)
    np.testing.assert_allclose(
        _next([0.4, 0.24, 0.16, 0.2], with_empty), [*_next([0.5, 0.3, 0.2], full), 0], atol=1e-15
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_a_perplexity_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    student = DomainReport(40, (20.0, bad * 10), (10, 10), (1.0, 1.0))
    with pytest.raises(NonFiniteLossError, match=r"student's .* step 40 is not finite in code;"):
        initial_factors(student, domains=["math", "code"])
    teacher = DomainReport(40, (20.0, 20.0), (10, 10), (bad, 1.0))
    with pytest.raises(NonFiniteLossError, match=r"teacher's .* not finite in math;"):
        updated_factors((0.5, 0.5), teacher, alpha=0.5, domains=["math", "code"])


def test_no_validation_text_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no domain has validation text"):
        initial_factors(DomainReport(0, (0.0,), (0,), (1.0,)), domains=["math"])
