"""Domain weights from losses: DoReMi, Sheared LLaMA and online data mixing, float64, pure.

D domains in config order
"""

from collections.abc import Sequence

import numpy as np

from shared.mixture.ddk import refuse_non_finite
from shared.mixture.simplex import softmax
from shared.mixture.weight_log import DomainReport


def raised_weights(
    weight_D: np.ndarray, loss_D: np.ndarray, *, step_size: float, smoothing: float
) -> np.ndarray:
    """w exp(eta loss), normalised, mixed with the uniform distribution (DoReMi, arXiv 2305.10429,
    Algorithm 1; Sheared LLaMA, arXiv 2310.06694, Algorithm 1). Losses in nats."""
    with np.errstate(divide="ignore"):
        logit_D = np.log(weight_D) + step_size * loss_D
    return (1 - smoothing) * softmax(logit_D) + smoothing / len(weight_D)


def excess_losses(report: DomainReport, last_D: np.ndarray) -> np.ndarray:
    """Mean over training tokens of max(student NLL - teacher NLL, 0), nats [D] (DoReMi).

    A domain that was not seen since the report before keeps its last value.
    """
    return _means(report.training_excess_sums, report.training_tokens, otherwise_D=last_D)


def loss_differences(report: DomainReport, *, domains: Sequence[str]) -> np.ndarray:
    """Validation loss above the teacher's, at least 0, nats [D] (Sheared LLaMA).

    A domain without validation tokens gets 0. Raises NonFiniteLossError.
    """
    return np.maximum(validation_gaps(report, domains=domains), 0)


def validation_gaps(report: DomainReport, *, domains: Sequence[str]) -> np.ndarray:
    """Validation loss of the student minus the teacher's, nats per token [D].

    A domain without validation tokens gets 0. Raises NonFiniteLossError.
    """
    nothing_D = np.zeros(len(domains))
    student_D = _means(report.student_nll_sums, report.num_tokens, otherwise_D=nothing_D)
    counted_D = np.array(report.num_tokens) > 0
    teacher_D = np.where(counted_D, report.teacher_nlls, 0.0)
    for model, loss_D in (("student", student_D), ("teacher", teacher_D)):
        bad_D = ~np.isfinite(loss_D)
        refuse_non_finite(f"{model}'s validation loss", bad_D, step=report.step, domains=domains)
    return student_D - teacher_D


def smoothed_rewards(
    reward_D: np.ndarray, report: DomainReport, *, weight_D: np.ndarray, smoothing: float
) -> np.ndarray:
    """R = xi R + (1 - xi) KL / pi: importance weighted rewards [D] (arXiv 2312.02406, Algorithm 1).

    `weight_D` is pi, the weights under which the text was drawn, their mean where they changed.
    A domain that was not seen keeps its reward, and so does one that was to get nothing.
    """
    kl_D = _means(report.training_kl_sums, report.training_tokens, otherwise_D=reward_D)
    seen_D = (np.array(report.training_tokens) > 0) & (weight_D > 0)
    new_D = smoothing * reward_D + (1 - smoothing) * kl_D / np.where(seen_D, weight_D, 1)
    return np.where(seen_D, new_D, reward_D)


def exp3_weights(reward_D: np.ndarray, *, decision: int) -> np.ndarray:
    """(1 - D eps_t) softmax(eps_{t-1} R) + eps_t at decision t [D] (arXiv 2312.02406, Algorithm 1).

    Decision 0 is uniform.
    """
    count = len(reward_D)
    least = exploration(decision, num_domains=count)
    before = exploration(max(0, decision - 1), num_domains=count)
    return (1 - count * least) * softmax(before * reward_D) + least


def exploration(decision: int, *, num_domains: int) -> float:
    """eps_t = min(1/D, sqrt(ln D / (D t))): the least weight of a domain at decision t."""
    if decision == 0:
        return 1 / num_domains
    return float(min(1 / num_domains, np.sqrt(np.log(num_domains) / (num_domains * decision))))


def _means(sums: Sequence[float], counts: Sequence[int], *, otherwise_D: np.ndarray) -> np.ndarray:
    count_D = np.array(counts, np.float64)
    return np.divide(sums, count_D, out=otherwise_D.astype(np.float64), where=count_D > 0)
