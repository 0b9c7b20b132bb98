"""Names of the numbers that a step sums up, and where each stands in the one vector they travel in.

The vector is added over units, steps and ranks; nothing else knows its order.

G domains in config order   L layers with routers   E experts of each
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.config.run import Config
from student_trainer.losses.across.reading import COMPARED
from student_trainer.losses.registry import loss_names, reports_of, terms_of
from student_trainer.weighing.weightings import policy_sums_of, reports_of_weighting

# Over all domains, before the losses: the weighted loss in nats, the teacher's mass on the kept ids
# (of drawn ones, what is not estimated), and the student's outside them, both at the temperature of
# the KL (0 without a teacher).
TOTALS = ("loss", "captured_mass", "unseen_mass")
# After the losses, where the student writes rows: the tokens that it wrote, and of each its
# probability now over that with which it was drawn.
ROLLOUTS = ("written_tokens", "importance_ratio")
# By domain, before what losses report, nats: KL(teacher || student), bucketed at temperature 1 or
# estimated from drawn ids at theirs, and how far the student's NLL of the label exceeds the
# teacher's, never below 0.
BY_DOMAIN = ("kl", "excess")
# Last, where the routers of a mixture are balanced: the tokens sent to each expert, by layer.
EXPERT_TOKENS = "expert_tokens"
# After it, what a weighting sums up beside what it reports.
POLICY = "policy"
# In the order of checkpoints whose sums are a list: always there, 0 where no loss reported them.
LISTED = (*BY_DOMAIN, "hard_share", "uncertainty", "tkd", "dkd")


@dataclass(frozen=True, slots=True)
class SumLayout:
    """`TOTALS`, each loss unweighted, then `BY_DOMAIN` and what losses and a weighting report, by
    domain, and the load of experts."""

    losses: tuple[str, ...]
    reports: tuple[str, ...]
    num_domains: int  # G
    writes: bool = False  # whether the student writes rows
    routers: tuple[int, int] = (0, 0)  # L and E
    policy: int = 0  # further sums of a weighting

    @staticmethod
    def of(config: Config, *, routers: tuple[int, int] = (0, 0)) -> "SumLayout":
        """That of a run, whose student has such routers to balance."""
        reports = reports_of(terms_of(config.losses)) + reports_of_weighting(config.weighting)
        if config.cross_tokenizer is not None and config.needs_teacher:
            reports += (COMPARED,)
        names, writes = tuple(loss_names(config.losses)), config.source.writes
        policy = policy_sums_of(config)
        return SumLayout(names, reports, len(config.domains), writes, routers, policy)

    @property
    def totals(self) -> tuple[str, ...]:
        """Names of the sums over all domains."""
        written = ROLLOUTS if self.writes else ()
        return (*TOTALS, *(f"losses.{name}" for name in self.losses), *written)

    @property
    def by_domain(self) -> tuple[str, ...]:
        """Names of the sums by domain."""
        return (*BY_DOMAIN, *self.reports)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sums, in their order."""
        load = (EXPERT_TOKENS,) if self.routers[0] else ()
        learnt = (POLICY,) if self.policy else ()
        return (*self.totals, *self.by_domain, *load, *learnt)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self._before_policy + self.policy

    @property
    def _before_experts(self) -> int:
        return len(self.totals) + len(self.by_domain) * self.num_domains

    @property
    def _before_policy(self) -> int:
        return self._before_experts + self.routers[0] * self.routers[1]

    def place(self, name: str) -> slice:
        """Where a sum stands: one number, G by domain, L * E by layer and expert, or the
        policy's."""
        if name == EXPERT_TOKENS:
            return slice(self._before_experts, self._before_policy)
        if name == POLICY:
            return slice(self._before_policy, self.size)
        if name in self.totals:
            first = self.totals.index(name)
            return slice(first, first + 1)
        first = len(self.totals) + self.by_domain.index(name) * self.num_domains
        return slice(first, first + self.num_domains)

    def joined(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The vector, float64, of scalars, [G] and [L, E] by name."""
        return torch.cat([sums[name].double().reshape(-1) for name in self.names])

    def totals_in(self, vector: np.ndarray) -> dict[str, float]:
        """Each of `TOTALS`, by its name."""
        return dict(zip(TOTALS, vector.tolist(), strict=False))

    def losses_in(self, vector: np.ndarray) -> dict[str, float]:
        """Each loss's sum, by its name."""
        return dict(zip(self.losses, vector[len(TOTALS) :].tolist(), strict=False))

    def state(self, vector: np.ndarray) -> dict[str, list[float]]:
        """The vector by name, for a checkpoint."""
        return {name: vector[self.place(name)].tolist() for name in self.names}

    def from_state(self, state: dict[str, list[float]] | list[float]) -> np.ndarray:
        """The inverse of `state`; a list has the order of `LISTED`."""
        if isinstance(state, list):
            listed = SumLayout(self.losses, LISTED[len(BY_DOMAIN) :], self.num_domains)
            state = listed.state(np.array(state))
        # Of a loss, or a report, that came later.
        absent = {f"losses.{name}": [0.0] for name in self.losses}
        absent |= {name: [0.0] * self.num_domains for name in self.reports}
        absent[EXPERT_TOKENS] = [0.0] * (self.routers[0] * self.routers[1])
        return np.concatenate([(absent | state)[name] for name in self.names])
