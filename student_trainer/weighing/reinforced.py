"""A policy network that learns which changed documents to keep (Learning to Augment, arXiv
2101.08106).

Of a changed document with the features x it keeps, with the probability p = sigmoid(w x), what it
draws with the document's own number; what it leaves out counts 0, all else 1. In losses of the
text, of which changed documents are no part, those count 0. The reward is the fall of the student's
loss on a fixed part of the validation text between two looks: with R the reward, b the running mean
of those before, and the sum over all that was drawn since the last look,

    w <- w + step_size (R - b) sum (a - p) x,   a = 1 of what was kept and 0 of others

which is REINFORCE with a baseline: (a - p) x is the gradient of the log-probability of a draw. The
first reward has no baseline and changes nothing.

The paper's equations are not public to us: features, reward and update are a reconstruction, with
the loss of a validation text in place of a task's accuracy.

N positions with loss of a unit   C changed documents of a unit   F features
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shared.config.weighting import ReinforcedSelection
from student_trainer.weighing.weigher import Look
from student_trainer.weighing.weighting import PositionWeights, Seen, StepMeans

FEATURES = ("bias", "student_confidence", "teacher_confidence", "disagreement")
UNIT = 2.0**-63  # of documents' numbers, in 0 to 1


def features(teacher_logprob_C: Tensor, student_logprob_C: Tensor) -> Tensor:
    """x of documents, float64 [C, F]: 1, the geometric means of both models' probabilities of the
    labels, and how much surer of them the teacher is, tanh of nats per token."""
    columns = (
        torch.ones_like(teacher_logprob_C),
        student_logprob_C.exp(),
        teacher_logprob_C.exp(),
        torch.tanh(teacher_logprob_C - student_logprob_C),
    )
    return torch.stack(columns, dim=-1)


class Selection:
    """The policy with its network; satisfies `Weighting`."""

    reported: ClassVar[tuple[str, ...]] = ("changed_share", "kept_share")
    looks: ClassVar[frozenset[Look]] = frozenset({"label_logprob"})
    way_out: ClassVar[str] = "lower augmentation.share, or raise weighting.start"
    num_policy_sums: ClassVar[int] = len(FEATURES)

    def __init__(self, section: ReinforcedSelection, *, num_domains: int) -> None:
        self._section = section
        self.weights_F = np.zeros(len(FEATURES))
        odds = section.start / (1 - section.start) if section.start < 1 else math.inf
        self.weights_F[0] = math.log(odds)
        self._gradient_F = np.zeros(len(FEATURES))  # of the log-probability of all since the look
        self._loss: float | None = None  # of the last look, nats per token
        self._baseline: float | None = None

    def weights(self, seen: Seen) -> PositionWeights:
        """1 of what is kept or was not changed, 0 of what is left out."""
        changed_N = seen.changed_N
        assert changed_N is not None, "documents are changed"
        is_changed_N = changed_N != 0
        taught_N = seen.mean_by_document(seen.label_logprob_N.double())
        own_N = seen.mean_by_document(seen.student["label_logprob"].double())
        x_NF = features(taught_N, own_N)
        keep_N = torch.sigmoid(_product(x_NF, self.weights_F))
        kept_N = (changed_N.double() * UNIT < keep_N) | ~is_changed_N
        score_NF = (kept_N.double() - keep_N)[:, None] * x_NF
        return PositionWeights(
            kept_N.double(),
            (~is_changed_N).double(),
            {
                "changed_share": is_changed_N.double(),
                "kept_share": (is_changed_N & kept_N).double(),
            },
            policy_F=_once_each(score_NF, seen.document_N, is_changed_N),
        )

    def is_due(self, step: int) -> bool:
        """Whether the validation loss is looked at before a step."""
        return step % self._section.every == 0

    @property
    def rows(self) -> int:
        """Validation rows of each domain that a look reads."""
        return self._section.rows

    def look(self, loss: float) -> None:
        """Take in a validation loss, nats per token, and learn from what it rewards."""
        if self._loss is not None:
            self._learn(self._loss - loss)
        self._loss, self._gradient_F = loss, np.zeros(len(FEATURES))

    def _learn(self, reward: float) -> None:
        if self._baseline is None:
            self._baseline = reward
        advantage, decay = reward - self._baseline, self._section.decay
        self.weights_F = self.weights_F + self._section.step_size * advantage * self._gradient_F
        self._baseline = decay * self._baseline + (1 - decay) * reward

    def follow(self, step: StepMeans) -> None:
        """See `Weighting`."""
        self._gradient_F = self._gradient_F + step.policy_F

    def state(self) -> dict[str, Any]:
        """See `Stateful`; the network's probability of 1 is no number of JSON."""
        return {
            "weights": [w if math.isfinite(w) else None for w in self.weights_F.tolist()],
            "gradient": self._gradient_F.tolist(),
            "loss": self._loss,
            "baseline": self._baseline,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self.weights_F = np.array([math.inf if w is None else w for w in state["weights"]])
        self._gradient_F = np.array(state["gradient"])
        self._loss, self._baseline = state["loss"], state["baseline"]


def _product(x_NF: Tensor, weights_F: np.ndarray) -> Tensor:
    return x_NF @ torch.as_tensor(weights_F, device=x_NF.device)


def _once_each(value_NF: Tensor, document_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The sum of documents' values, whose positions all have the same, over the documents that are
    chosen, [F]."""
    order_N = torch.arange(len(document_N), device=document_N.device)
    size = int(document_N.max()) + 1 if len(document_N) else 0
    first_D = torch.full((size,), len(document_N), device=document_N.device)
    first_D = first_D.scatter_reduce(0, document_N, order_N, "amin")
    first_D = first_D[first_D < len(document_N)]
    return value_NF[first_D[chosen_N[first_D]]].sum(0)
