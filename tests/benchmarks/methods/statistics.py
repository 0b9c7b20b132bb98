"""From the records of cells to numbers with intervals.

A gap is the student's NLL minus the teacher's on validation text, nats per token. Intervals are
Student's t over seeds, 95 %; differences are paired by seed, so that what a seed does to both
methods cancels. Nothing is corrected for the number of comparisons.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Record = Mapping[str, Any]
Measure = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and half the width of its interval, NaN for a single seed."""

    mean: float
    half_width: float
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says which sign it has."""
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student-t interval of independent values."""
    count = len(values)
    if count < 2:
        return Estimate(float(np.mean(values)), math.nan, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Estimate(float(np.mean(values)), quantile * error, count)


def paired(records: Iterable[Record], cell: str, against: str, measure: Measure) -> Estimate | None:
    """`measure` of a cell minus that of another, over the seeds that both have."""
    values: dict[str, dict[int, float]] = {cell: {}, against: {}}
    for record in records:
        if record["cell"] in values:
            values[record["cell"]][record["seed"]] = measure(record)
    seeds = sorted(values[cell].keys() & values[against].keys())
    if not seeds:
        return None
    return estimate([values[cell][seed] - values[against][seed] for seed in seeds])


def recovered(domain: Mapping[str, float]) -> float:
    """Share of a domain's gap that training closed: 1 is the teacher, 0 the student before."""
    before, after, teacher = (domain[n] for n in ("nll_before", "nll_after", "teacher_nll"))
    return (before - after) / (before - teacher)


def mean_recovered(record: Record) -> float:
    """Mean over domains of the recovered share."""
    return float(np.mean([recovered(domain) for domain in record["domains"].values()]))


def mean_kl(record: Record) -> float:
    """Mean over domains of KL(teacher || student) over the whole vocabulary, after training."""
    return float(np.mean([domain["kl_after"] for domain in record["domains"].values()]))


def worst_gap(record: Record) -> float:
    """The largest gap left in a domain."""
    return max(d["nll_after"] - d["teacher_nll"] for d in record["domains"].values())


def calibration(record: Record) -> float:
    """The student's expected calibration error on validation text, after training."""
    return record["calibration_error"]


def recovered_in(name: str) -> Measure:
    """The recovered share of one domain."""
    return lambda record: recovered(record["domains"][name])


def teacher_seconds_per_token(records: Iterable[Record]) -> float:
    """CPU seconds of the teacher per token that it scored, over all cells."""
    pairs = [(record["cpu_s"]["teacher"], record["teacher_tokens"]) for record in records]
    tokens = sum(count for _, count in pairs)
    return sum(seconds for seconds, _ in pairs) / tokens if tokens else 0.0
