"""What `tutelage eval` says of rows with classes: how many are told right, and F1.

D documents, of one row each   B bins of confidence
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluation.statistics import Estimate, Measures, ratio
from cluster.report.record import read_json

# How far above 1 rounding may put a probability; the likeliest of fewer than a million classes has
# more, so that a wrong one's gap lies below.
ROUNDING = 1e-6


def right(gap_DB: np.ndarray) -> np.ndarray:
    """Whether the likeliest class of each row is its own, 0 or 1 [D], from what that is less its
    probability; NaN where it is not known."""
    gap_D = gap_DB.sum(axis=1)
    return np.where(np.isnan(gap_D), np.nan, gap_D > -ROUNDING)


def with_classes(measured: Measures, gap_DB: np.ndarray, macro_f1: float | None) -> Measures:
    """The measures of a model on rows with classes; a mean of F1 over classes has no standard
    error."""
    found = right(gap_DB)
    f1 = None if macro_f1 is None else Estimate(macro_f1, None)
    return replace(measured, accuracy=ratio(found, np.ones(len(found))), macro_f1=f1)


def with_difference(measured: Measures, gaps: tuple[np.ndarray, np.ndarray]) -> Measures:
    """Differences of two models with that of their accuracies, paired by row."""
    one, other = map(right, gaps)
    return replace(measured, accuracy=ratio(one - other, np.ones(len(one))))


def macro_f1s(run_dir: Path) -> dict[str, dict[str, float | None]]:
    """Of the models that evaluations of a run have left in its folder, by domain."""
    written = read_json(run_dir / "evaluations.json")
    latest = read_json(run_dir / "evaluation.json") or written.get("after", {})
    return {
        "teacher": _macro_f1(latest, "teacher"),
        "before": _macro_f1(written.get("before", {}), "student"),
        "after": _macro_f1(latest, "student"),
    }


def _macro_f1(domains: Mapping[str, Any], model: str) -> dict[str, float | None]:
    scores = {name: found.get(f"{model}_scores") for name, found in domains.items()}
    return {name: None if own is None else own["macro_f1"] for name, own in scores.items()}
