"""Means over validation tokens with their standard errors, which are over documents.

Tokens of one document are no independent draws, so a mean over tokens is taken as a ratio of sums
over documents, and its standard error as that of a ratio estimator (Cochran, Sampling Techniques,
1977, section 2.11): sqrt(D / (D - 1) * sum((s_d - mean * w_d)^2)) / sum(w_d).

D documents   B bins of confidence
"""

import math
from dataclasses import dataclass

import numpy as np

from shared.run.document_sums import DocumentSums

NATS_PER_BIT = math.log(2)
MODELS = ("student", "teacher")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float | None  # None: a single document tells nothing of others


@dataclass(frozen=True, slots=True)
class Measures:
    """One model on one domain's validation text; of what it wrote, means over prompts."""

    nll: Estimate | None  # nats per token; None without a teacher
    bits_per_byte: Estimate | None  # None also where no token has text, and of classes
    kl: Estimate | None  # KL(teacher || student), nats per token; None for the teacher itself
    ece: Estimate | None  # expected calibration error; None where the likeliest id is not known
    exact_match: Estimate | None = None  # of its answers, which are right but for case and the like
    token_f1: Estimate | None = None
    rouge_l: Estimate | None = None
    cut: int | None = None  # answers that came to the limit of tokens
    accuracy: Estimate | None = None  # of rows with classes, as the next
    macro_f1: Estimate | None = None
    span_f1: Estimate | None = (
        None  # of rows with entities, whole and with their types, as the next
    )
    precision: Estimate | None = None
    recall: Estimate | None = None


def ratio(sums_D: np.ndarray, weights_D: np.ndarray) -> Estimate | None:
    """The mean of what is summed per unit of weight; None where it is unknown or of nothing."""
    count, total = len(sums_D), weights_D.sum()
    if not total or not np.isfinite(sums_D).all():
        return None
    mean = sums_D.sum() / total
    if count < 2:
        return Estimate(float(mean), None)
    spread = count / (count - 1) * np.square(sums_D - mean * weights_D).sum()
    return Estimate(float(mean), float(np.sqrt(spread) / total))


def calibration_error(gap_DB: np.ndarray, tokens_D: np.ndarray) -> Estimate | None:
    """Expected calibration error (Guo et al. 2017, equation 3) from the gaps of each document: the
    mean distance of accuracy and confidence, bin by bin. Its standard error is to first order,
    where no bin's gap changes its sign."""
    return ratio(gap_DB @ np.sign(gap_DB.sum(0)), tokens_D)


def measures(documents: DocumentSums, bytes_D: np.ndarray | None, *, of: str) -> Measures:
    """The measures of `student` or `teacher` on some documents; their bytes are None of classes."""
    tokens_D, nll_D = documents.column("tokens"), documents.column(f"{of}_nll")
    return Measures(
        nll=ratio(nll_D, tokens_D),
        bits_per_byte=_bits_per_byte(nll_D, bytes_D),
        kl=ratio(documents.column("kl"), tokens_D) if of == "student" else None,
        ece=calibration_error(documents.column(f"{of}_gap"), tokens_D),
    )


def _bits_per_byte(nll_D: np.ndarray, bytes_D: np.ndarray | None) -> Estimate | None:
    return None if bytes_D is None else ratio(nll_D / NATS_PER_BIT, bytes_D)


def difference(one: DocumentSums, other: DocumentSums, bytes_D: np.ndarray | None) -> Measures:
    """How much higher the first student is than the second on the same documents, paired by
    document."""
    tokens_D = one.column("tokens")
    nll_D = one.column("student_nll") - other.column("student_nll")
    gaps = (documents.column("student_gap") for documents in (one, other))
    signed = [gap_DB @ np.sign(gap_DB.sum(0)) for gap_DB in gaps]
    return Measures(
        nll=ratio(nll_D, tokens_D),
        bits_per_byte=_bits_per_byte(nll_D, bytes_D),
        kl=ratio(one.column("kl") - other.column("kl"), tokens_D),
        ece=ratio(signed[0] - signed[1], tokens_D),
    )
