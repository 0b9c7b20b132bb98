"""Whether a student's probabilities can be believed: the expected calibration error.

Guo et al. 2017 (arXiv 1706.04599), Eq. 3, over bins of equal width of the likeliest token's
probability (Naeini, Cooper and Hauskrecht 2015).

N positions with loss   V vocabulary   B bins
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from student_trainer.run import Run

BINS = 15
ROWS = 8  # of a forward pass


def calibration_error(confidence_N: Tensor, correct_N: Tensor, *, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over bins, weighted by their tokens.

    `confidence_N` in [0, 1], `correct_N` bool. At least one token.
    """
    bin_N = (confidence_N.double() * bins).long().clamp(max=bins - 1)
    surplus_N = confidence_N.double() - correct_N.double()
    surplus_B = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_N, surplus_N)
    return float(surplus_B.abs().sum() / len(confidence_N))


def student_calibration_error(run: Run) -> float:
    """That of a run's student on the validation tokens of all domains."""
    confidences, hits = zip(*_predictions(run), strict=True)
    return calibration_error(torch.cat(confidences), torch.cat(hits))


@torch.no_grad()
def _predictions(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each unit: the likeliest token's probability [N], and whether it is the label [N]."""
    run.engine.eval()
    for store in run.validation.stores:
        for rows in store.units(ROWS):
            batch = run.layouts.batch(rows, None)
            (logits_NV,) = run.engine(batch, mode="logits")
            probability_NV = logits_NV.float().softmax(-1)
            confidence_N, guess_N = probability_NV.max(-1)
            yield confidence_N.cpu(), (guess_N == batch["label_N"]).cpu()
    run.engine.train()
