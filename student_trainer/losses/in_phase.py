"""The losses of a run as a phase weights them.

N positions with loss
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from student_trainer.losses.registry import auxiliaries_of, loss_names, terms_of

if TYPE_CHECKING:
    from shared.config.losses import Loss
    from student_trainer.weighing.weighting import PositionWeights


class PhaseLosses:
    """The losses of a run with the weights that they have in a phase, in config order."""

    def __init__(self, sections: "Sequence[Loss]", projections: nn.ModuleDict) -> None:
        named = dict(zip(loss_names(sections), sections, strict=True))
        self.weights = {name: section.weight for name, section in named.items()}
        self.terms = terms_of(sections)
        self.auxiliaries = auxiliaries_of(sections, projections)
        self._taught = {name for name, section in named.items() if section.asks_teacher}
        self._of_text = {name for name, term in self.terms.items() if term.needs.text}

    def counts(
        self, weight_N: Tensor | None, counted: "PositionWeights | None"
    ) -> dict[str, Tensor]:
        """What each position counts in a loss [N], by its name; absent: 1 each. `weight_N` is that
        of a weigher, `counted` that of a weighting."""
        found = {}
        for name in self.weights:
            kind = {"asks_teacher": name in self._taught, "text": name in self._of_text}
            own_N = None if counted is None else counted.in_loss(**kind)
            factors = [factor_N for factor_N in (weight_N, own_N) if factor_N is not None]
            if factors:
                found[name] = math.prod(factors[1:], start=factors[0])
        return found
