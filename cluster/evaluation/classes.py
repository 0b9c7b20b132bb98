"""What `tutelage eval` says of rows with classes or entities: how many are told right, and F1.

D documents, of one row each   B bins of confidence
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluation.statistics import Estimate, Measures, ratio
from shared.run.run_dir import read_written

# How far above 1 rounding may put a probability; the likeliest of fewer than a million classes has
# more, so that a wrong one's gap lies below.
ROUNDING = 1e-6
OF_ALL = ("macro_f1", "span_f1", "precision", "recall")  # scores of all rows of a domain


def right(gap_DB: np.ndarray) -> np.ndarray:
    """Whether the likeliest class of each row is its own, 0 or 1 [D], from what that is less its
    probability; NaN where it is not known."""
    gap_D = gap_DB.sum(axis=1)
    return np.where(np.isnan(gap_D), np.nan, gap_D > -ROUNDING)


def with_labels(
    measured: Measures, gap_DB: np.ndarray, scores: Mapping[str, float] | None, *, one_each: bool
) -> Measures:
    """The measures of a model on rows with classes or entities. A score of all rows together has no
    standard error; where a row has `one_each`, a class, how many are told right has one."""
    named: dict[str, Estimate | None] = {
        name: Estimate(scores[name], None) for name in OF_ALL if scores and name in scores
    }
    if one_each:
        found = right(gap_DB)
        named["accuracy"] = ratio(found, np.ones(len(found)))
    return replace(measured, **named)


def with_difference(measured: Measures, gaps: tuple[np.ndarray, np.ndarray]) -> Measures:
    """Differences of two models with that of their accuracies, paired by row."""
    one, other = map(right, gaps)
    return replace(measured, accuracy=ratio(one - other, np.ones(len(one))))


def scores_of(run_dir: Path) -> dict[str, dict[str, Mapping[str, float] | None]]:
    """Of the models that evaluations of a run have left in its folder, by domain; None of one that
    has none."""
    written = read_written(run_dir / "evaluations.json")
    latest = read_written(run_dir / "evaluation.json") or written.get("after", {})
    return {
        "teacher": _scores(latest, "teacher"),
        "before": _scores(written.get("before", {}), "student"),
        "after": _scores(latest, "student"),
    }


def _scores(domains: Mapping[str, Any], model: str) -> dict[str, Mapping[str, float] | None]:
    return {name: found.get(f"{model}_scores") for name, found in domains.items()}
