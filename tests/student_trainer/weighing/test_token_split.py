"""The split of a step's tokens into hard and easy ones."""

import numpy as np
import pytest
import torch

from shared.config.losses import ATKD
from student_trainer.weighing.token_split import TokenSplit


def logprobs(seed: int, *, count: int) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(size=count).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_threshold_of_one_half_is_the_lower_median(count):
    label_logprob_N = logprobs(0, count=count)
    split = TokenSplit.of(label_logprob_N, hard_fraction=0.5)
    uncertainty_N = -torch.expm1(torch.from_numpy(label_logprob_N))
    hard_N = uncertainty_N >= uncertainty_N.median()
    assert (split.num_hard, split.num_easy) == (int(hard_N.sum()), int((~hard_N).sum()))
    found = split.columns(label_logprob_N, ATKD())["hard_N"]
    assert found.tolist() == hard_N.tolist()


def test_ties_are_hard():
    split = TokenSplit.of(np.array([-1.0, -1.0, -1.0, -2.0], np.float32), hard_fraction=0.5)
    assert (split.num_hard, split.num_easy) == (4, 0)


@pytest.mark.parametrize(("fraction", "hard"), [(0.0, 0), (0.3, 4), (0.7, 8), (1.0, 11)])
def test_any_share_can_be_hard(fraction, hard):
    split = TokenSplit.of(logprobs(1, count=11), hard_fraction=fraction)
    assert (split.num_hard, split.num_easy) == (hard, 11 - hard)


@pytest.mark.parametrize("easy", [0.2, 0.35])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_the_weighted_mean_is_the_papers_loss(fraction, easy):
    label_logprob_N = logprobs(2, count=37)
    split = TokenSplit.of(label_logprob_N, hard_fraction=fraction)
    value_N = torch.rand(37, generator=torch.Generator().manual_seed(0))
    columns = split.columns(label_logprob_N, ATKD(easy_weight=easy))
    found = {name: torch.from_numpy(column_N) for name, column_N in columns.items()}
    hard_N = found["hard_N"]
    means = [part.mean() if len(part) else 0 for part in (value_N[~hard_N], value_N[hard_N])]
    expected = easy * means[0] + (1 - easy) * means[1]
    torch.testing.assert_close(
        (found["class_weight_N"] * value_N).mean(), torch.as_tensor(expected)
    )


def test_no_tokens_give_no_classes():
    split = TokenSplit.of(np.zeros(0, np.float32), hard_fraction=0.5)
    found = split.columns(np.zeros(0, np.float32), ATKD())
    assert (split.num_hard, split.num_easy, len(found["hard_N"])) == (0, 0, 0)
