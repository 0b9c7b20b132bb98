"""What the trainer optimises: a weighted sum of terms, in nats per token, and what it reports.

Terms are values with the fields of the config's loss sections, read by name, so that this module
needs torch alone. Values per token are unweighted, without mask or mean; the one reduction is
`multiplier x sum over tokens`, with the multiplier the trainer derives from the whole step.

N positions   n positions of a chunk   K ids kept per position   S temperatures shipped
V student vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from student_trainer.losses.chunk import LogProbs
from student_trainer.losses.divergences import (
    DIVERGENCES,
    Buckets,
    forward_kl,
    teacher_distribution,
)
from student_trainer.losses.fused import fused_token_loss
from student_trainer.losses.hidden_states import HiddenStatePairs, hidden_state_loss
from student_trainer.losses.primitive import Head


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """What the teacher shipped, decoded, on the student's device."""

    ids_NK: Tensor  # int64
    logprobs_NK: Tensor  # float32, temperature 1, normalised over the teacher's vocabulary
    log_tail_NS: Tensor  # float32, exact log-mass outside the kept ids per temperature
    temperatures: tuple[float, ...]  # S, with 1 among them


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """A micro-batch's loss and what there is to report about each of its tokens."""

    loss: Tensor  # scalar with a gradient: multiplier x weighted sum
    terms: dict[str, Tensor]  # name -> [N], unweighted, nats (hidden states: no unit)
    label_nll_N: Tensor  # cross-entropy of the text's own next token, nats
    kl_N: Tensor | None  # bucketed KL(teacher || student) at temperature 1; None: no teacher
    captured_mass_N: Tensor | None  # teacher mass on the kept ids; None: no teacher


def token_losses(
    hidden_ND: Tensor,
    head: Head,
    *,
    label_N: Tensor,
    terms: Sequence[Any],
    multiplier: float | Tensor = 1.0,
    targets: TeacherTargets | None = None,
    hidden_states: HiddenStatePairs | None = None,
    chunk_rows: int | None = None,
) -> TokenLosses:
    """Evaluate all terms on the states at the positions with loss.

    A term has `kind` and `weight`; a divergence also `temperature` and
    `times_temperature_squared`; hidden states `layers` and `distance`. Terms that learn from the
    teacher need `targets`, or `hidden_states` respectively. The gradient is that of the weighted
    sum of the terms, for hidden states, head and projections.
    """
    objective = WeightedTerms(
        tuple(term for term in terms if term.kind != "hidden_states"),
        label_N=label_N,
        targets=targets,
        multiplier=multiplier,
        vocabulary=head.vocabulary,
    )
    loss, values_NJ = fused_token_loss(hidden_ND, head, objective=objective, chunk_rows=chunk_rows)
    columns = iter(values_NJ.unbind(-1))
    label_nll_N, kl_N = next(columns), next(columns)
    values: dict[str, Tensor] = {}
    for name, term in zip(term_names(terms), terms, strict=True):
        if term.kind == "hidden_states":
            assert hidden_states is not None, "the loss hidden_states needs both models' states"
            value_N = hidden_state_loss(hidden_states, layers=term.layers, distance=term.distance)
            loss = loss + multiplier * term.weight * value_N.sum()
            values[name] = value_N.detach()
        else:
            values[name] = next(columns)
    return TokenLosses(
        loss=loss,
        terms=values,
        label_nll_N=label_nll_N,
        kl_N=None if targets is None else kl_N,
        captured_mass_N=None if targets is None else captured_mass(targets),
    )


@torch.no_grad()
def evaluate_tokens(
    hidden_ND: Tensor,
    head: Head,
    *,
    label_N: Tensor,
    targets: TeacherTargets | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Student NLL of the labels [N] and KL(teacher || student) [N], nats, without gradients.

    The KL is over the full vocabulary where the targets keep all of it, else bucketed; None
    without targets.
    """
    found = token_losses(
        hidden_ND, head, label_N=label_N, terms=(), targets=targets, chunk_rows=chunk_rows
    )
    return found.label_nll_N, found.kl_N


def captured_mass(targets: TeacherTargets) -> Tensor:
    """Teacher mass on the kept ids at temperature 1 [N], from the exact tail."""
    return -torch.expm1(targets.log_tail_NS[:, targets.temperatures.index(1.0)])


def term_names(terms: Sequence[Any]) -> list[str]:
    """One name per term: its kind, numbered from the second of a kind on."""
    kinds = [term.kind for term in terms]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return [k if count == 1 else f"{k}_{count}" for k, count in zip(kinds, counts, strict=True)]


@dataclass(frozen=True, slots=True)
class WeightedTerms:
    """The terms on logits as a function of log-probabilities of kept ids and the label.

    Values: label NLL, KL at temperature 1 (0 without targets), then one per term. A student whose
    whole vocabulary is kept has no tail; the mass of a larger teacher's padding rows, which it
    cannot hold, is then left out and the kept ids share it.
    """

    terms: Sequence[Any]
    label_N: Tensor
    targets: TeacherTargets | None
    multiplier: float | Tensor
    vocabulary: int  # V
    temperatures: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = {term.temperature for term in self.terms if term.kind in DIVERGENCES} - {1.0}
        assert self.targets is not None or not any(t.kind in DIVERGENCES for t in self.terms), (
            "a divergence needs the teacher's targets"
        )
        object.__setattr__(self, "temperatures", (1.0, *sorted(wanted)))

    @property
    def num_ids(self) -> int:
        """The kept ids and the label."""
        return 1 if self.targets is None else self.targets.ids_NK.shape[1] + 1

    @property
    def num_values(self) -> int:
        """Two diagnostics and the terms."""
        return 2 + len(self.terms)

    def select(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The label rides along as the last id, not kept, whether or not it is among the others."""
        ids_nM = self.label_N[rows, None]
        if self.targets is not None:
            ids_nM = torch.cat([self.targets.ids_NK[rows], ids_nM], dim=1)
        kept_nM = torch.ones_like(ids_nM, dtype=torch.bool)
        kept_nM[:, -1] = False
        return ids_nM, kept_nM

    def evaluate(self, rows: slice, student: Sequence[LogProbs]) -> tuple[Tensor, Tensor]:
        """Weighted loss and unweighted values of a chunk."""
        nll_n = -student[0].ids_nM[:, -1]
        loss_n, values = torch.zeros_like(nll_n), []
        for term in self.terms:
            value_n = nll_n if term.kind == "cross_entropy" else self._soft(term, rows, student)
            loss_n = loss_n + self.multiplier * term.weight * value_n
            values.append(value_n)
        kl_n = torch.zeros_like(nll_n)
        if self.targets is not None:
            kl_n = forward_kl(*self._buckets(1.0, rows, student))
        return loss_n, torch.stack([nll_n, kl_n, *values], dim=-1)

    def _soft(self, term: Any, rows: slice, student: Sequence[LogProbs]) -> Tensor:
        value_n = DIVERGENCES[term.kind](*self._buckets(term.temperature, rows, student))
        return value_n * term.temperature**2 if term.times_temperature_squared else value_n

    def _buckets(
        self, temperature: float, rows: slice, student: Sequence[LogProbs]
    ) -> tuple[Buckets, Buckets]:
        """Teacher and student at a temperature, over the same kept ids and tail."""
        targets = self.targets
        assert targets is not None
        log_tail_n = targets.log_tail_NS[rows, targets.temperatures.index(temperature)]
        if targets.ids_NK.shape[1] >= self.vocabulary:
            log_tail_n = torch.full_like(log_tail_n, -torch.inf)
        teacher = teacher_distribution(
            targets.logprobs_NK[rows], log_tail_n, temperature=temperature
        )
        probs = student[self.temperatures.index(temperature)]
        return teacher, Buckets(probs.ids_nM[:, :-1], probs.tail_n)
