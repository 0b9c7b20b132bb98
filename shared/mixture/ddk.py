"""Domain discrepancy factors: where the student lags the teacher most (DDK, arXiv 2407.16154).

D domains in config order
"""

from collections.abc import Sequence

import numpy as np

from shared.errors import DataError, NonFiniteLossError
from shared.mixture.simplex import softmax
from shared.mixture.weight_log import DomainReport

Factors = tuple[float, ...]  # r of the paper, sum 1


def initial_factors(report: DomainReport, *, domains: Sequence[str]) -> Factors:
    """r^0: softmax of the perplexity ratios at temperature 1 (Eq. 1)."""
    ratio_D = perplexity_ratios(report, domains=domains)
    return tuple(softmax(ratio_D).tolist())


def updated_factors(
    previous: Factors, report: DomainReport, *, alpha: float, domains: Sequence[str]
) -> Factors:
    """r^{t+1}: r^t times exp(ratio), normalised and mixed with the uniform floor (Eq. 2)."""
    ratio_D = perplexity_ratios(report, domains=domains)
    counted_D = np.isfinite(ratio_D)
    with np.errstate(divide="ignore"):
        psi_D = softmax(np.log(previous) + ratio_D)
    r_D = alpha * psi_D + (1 - alpha) * counted_D / counted_D.sum()
    return tuple(r_D.tolist())


def perplexity_ratios(report: DomainReport, *, domains: Sequence[str]) -> np.ndarray:
    """Student perplexity over teacher perplexity, token means, float64 [D].

    A domain without validation tokens gets -inf, and so no weight. Perplexities must be finite,
    which keeps the ratios finite too: no cap distorts them.
    """
    counted_D = np.array(report.num_tokens) > 0
    if not counted_D.any():
        raise DataError("no domain has validation text; give at least one domain some")
    tokens_D = np.maximum(report.num_tokens, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        student_D = np.exp(np.array(report.student_nll_sums) / tokens_D)
        teacher_D = np.exp(np.array(report.teacher_nlls))
    for model, perplexity_D in (("student", student_D), ("teacher", teacher_D)):
        bad_D = counted_D & ~np.isfinite(perplexity_D)
        refuse_non_finite(
            f"{model}'s validation perplexity", bad_D, step=report.step, domains=domains
        )
    return np.divide(student_D, teacher_D, out=np.full(len(counted_D), -np.inf), where=counted_D)


def refuse_non_finite(
    quantity: str, bad_D: np.ndarray, *, step: int, domains: Sequence[str]
) -> None:
    """Raise NonFiniteLossError naming the domains that are bad, if any is."""
    if bad_D.any():
        names = ", ".join(name for name, bad in zip(domains, bad_D, strict=True) if bad)
        diverged = quantity.startswith("student") and step > 0
        way_out = "lower optimiser.lr" if diverged else "check the model"
        raise NonFiniteLossError(
            f"the {quantity} at step {step} is not finite in {names}; {way_out} or look at that "
            "text"
        )
