"""Reverse KL of whole texts by policy gradient, on tokens that the student wrote.

With q_b the student that wrote a token, q as it is now and A the token's advantage, which has no
gradient, the loss is

    -A q / q_b                                       (importance sampling)
    max(-A q / q_b, -A clip(q / q_b, 1 - c, 1 + c))  (with a clip c, as in PPO)

whose gradient at q = q_b is -A grad log q. With the advantages of `return`, undiscounted, its
expectation over texts is the gradient of KL(q(y) || p(y)) (MiniLLM, arXiv 2306.08543, Eq. 2, whose
-1 is 0 in the mean); with those of `token` it is on-policy distillation as Thinking Machines have
it (2025). Advantages are not whitened: taking their mean away takes the signal's level away.

n positions of a chunk
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from student_trainer.losses.terms.term import ChunkView, Needs, TermValues


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """The term; a step's weigher forms the advantages."""

    reported: ClassVar[tuple[str, ...]] = ()

    section: Any  # of the config: weight, clip

    @property
    def weight(self) -> float:
        """The section's."""
        return self.section.weight

    @property
    def needs(self) -> Needs:
        """Advantages, and with what log-probability a token was drawn."""
        return Needs(columns=("advantage_N", "behaviour_N"))

    @property
    def is_kl_at(self) -> None:
        """None."""
        return None

    def evaluate(self, chunk: ChunkView) -> TermValues:
        """Minus the advantage times the importance ratio; 0 where the student did not write."""
        advantage_n, behaviour_n = chunk.columns["advantage_N"], chunk.columns["behaviour_N"]
        ratio_n = (chunk.label_logprob_n - behaviour_n).exp()
        values_n = -advantage_n * ratio_n
        if (clip := self.section.clip) is not None:
            clipped_n: Tensor = -advantage_n * ratio_n.clamp(1 - clip, 1 + clip)
            values_n = torch.maximum(values_n, clipped_n)
        return TermValues(torch.where(advantage_n == 0, 0.0, values_n))
