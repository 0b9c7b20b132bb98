"""Which tokens of a step are hard for ATKD, and what each class counts (arXiv 2402.11890).

N tokens   H hard ones
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.config.losses import ATKD
from shared.data.rows import Rows
from shared.targets.routing import Answer, label_logprobs
from student_trainer.sources.batches import Batch, Layouts


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """Hard are tokens whose label log-probability is at most `threshold`, easy the others."""

    threshold: float
    num_hard: int
    num_easy: int

    @staticmethod
    def of(label_logprob_N: np.ndarray, *, hard_fraction: float) -> "TokenSplit":
        """Split at the (1 - k) quantile of the uncertainty 1 - p_g.

        The quantile is the element below where it falls between two: the lower median for
        k = 0.5. Ties are hard. With k = 0 nothing is hard.
        """
        count = len(label_logprob_N)
        if count == 0 or hard_fraction == 0:
            return TokenSplit(-math.inf, 0, count)
        # 1e-9: (1 - 0.7) * 10 is to be 3.
        place = math.floor((1 - hard_fraction) * (count - 1) + 1e-9)
        threshold = float(np.sort(label_logprob_N)[::-1][place])
        num_hard = int((label_logprob_N <= threshold).sum())
        return TokenSplit(threshold, num_hard, count - num_hard)

    def tensors(self, label_logprob_N: torch.Tensor, term: ATKD) -> dict[str, torch.Tensor]:
        """`hard_N` and `class_weight_N` of some of the tokens, to be merged into their batch.

        A weight is lambda N / (number of easy tokens), or (1 - lambda) N / (number of hard ones),
        so that the mean over the N tokens is lambda mean_easy + (1 - lambda) mean_hard.
        """
        num_tokens = self.num_hard + self.num_easy
        easy = term.easy_weight * num_tokens / max(1, self.num_easy)
        hard = (1 - term.easy_weight) * num_tokens / max(1, self.num_hard)
        hard_N = label_logprob_N <= self.threshold
        weights = torch.tensor([easy, hard], dtype=torch.float32, device=label_logprob_N.device)
        return {"hard_N": hard_N, "class_weight_N": weights[hard_N.long()]}


def split_batches(
    cut: Sequence[tuple[Rows, Answer]],
    layouts: Layouts,
    term: ATKD,
    *,
    gather: Callable[[np.ndarray], list[np.ndarray]],
) -> Iterator[Batch]:
    """The tensors of a rank's units with the split of the whole step's tokens beside them; `gather`
    gives what every rank has."""
    own_N = np.concatenate([label_logprobs(answer) for _, answer in cut])
    split = TokenSplit.of(np.concatenate(gather(own_N)), hard_fraction=term.hard_fraction)
    for rows, answer in cut:
        batch = layouts.batch(rows, answer)
        yield batch | split.tensors(batch["label_logprob_N"], term)
