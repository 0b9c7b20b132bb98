"""Teachers with a share in every token that the student writes: MiniLLM's teacher-mixed sampling
(arXiv 2306.08543, Eq. 4).

A text is then a function of the row, its draw, the version of the student's weights and the
teacher. What a token was drawn with is the mixture's log-probability, so that the ratio of a policy
gradient holds MiniLLM's weight w = q / (share p + (1 - share) q) of each token (Eq. 5), as it was
when the text was written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from shared.prompts.prefix import shown_prompts
from shared.run.plan import RunPlan
from shared.targets.generation import (
    Continuations,
    GenerationSpec,
    Generator,
    MixedGenerator,
    Openings,
    Partner,
    RemoteGenerator,
)


@dataclass(frozen=True, slots=True)
class Partners:
    """The teachers of a run, each beside the student on the rows of its domains."""

    plan: RunPlan
    generators: Mapping[str, RemoteGenerator]  # by teacher

    def teacher_of(self, domain: str) -> str:
        """Who has a share in what is written to a domain's prompts."""
        return self.plan.config.teacher_of(domain)

    def generate(
        self,
        generator: Generator,
        openings: Openings,
        spec: GenerationSpec,
        *,
        domains: Sequence[str],
        draws: Sequence[str],
    ) -> Continuations:
        """What the student, around whose model `generator` is, writes to prompts of domains of one
        teacher. Raises TutelageErrors of the service."""
        (teacher,) = {self.teacher_of(domain) for domain in domains}
        shown = Openings.build(
            names=openings.names(), input_ids=self._shown(openings.ids(), domains)
        )
        partner = Partner(
            self.generators[teacher],
            shown.with_draws(draws),
            self.plan.config.source.teacher_mix,
        )
        return cast(MixedGenerator, generator).generate_mixed(openings, spec, partner)

    def _shown(self, prompts: Sequence[np.ndarray], domains: Sequence[str]) -> list[np.ndarray]:
        """The prompts as the teacher has them."""
        return shown_prompts(prompts, domains, self.plan.openings)
