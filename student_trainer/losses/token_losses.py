"""What the trainer optimises: a weighted sum of terms, in nats per token, and what it reports.

Terms are values with the fields of the config's loss sections, read by name, so that this module
needs torch alone. Values per token are unweighted, without mask or mean; the one reduction is
`multiplier x sum over tokens`, with the multiplier the trainer derives from the whole step.

N positions   n positions of a chunk   K ids kept per position   S temperatures shipped
V student vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from student_trainer.losses.auxiliary.hidden_states import HiddenStatePairs, hidden_state_loss
from student_trainer.losses.kernel.buckets import Buckets, DrawnBuckets, teacher_distribution
from student_trainer.losses.kernel.chunk import LogProbs
from student_trainer.losses.kernel.drawn import DrawnTargets
from student_trainer.losses.kernel.fused import fused_token_loss
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherStates
from student_trainer.losses.terms.divergences import DIVERGENCES
from student_trainer.losses.terms.token_adaptive import (
    Decoupled,
    TokenClasses,
    decoupled,
    labelled_student,
    labelled_teacher,
)

# What a token-adaptive loss reports about each token beside its value.
ADAPTIVE = ("hard", "uncertainty", "tkd", "dkd")


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """What the teacher shipped, decoded, on the student's device."""

    ids_NK: Tensor  # int64
    logprobs_NK: Tensor  # float32, temperature 1, normalised over the teacher's vocabulary
    log_tail_NS: Tensor  # float32, exact log-mass outside the kept ids per temperature
    temperatures: tuple[float, ...]  # S, with 1 among them
    label_logprob_N: Tensor | None = None  # float32, exact
    renormalised: bool = False  # whether the tail is left out, as if the kept ids were everything

    @property
    def num_ids(self) -> int:
        """K."""
        return self.ids_NK.shape[1]

    def ids(self, rows: slice) -> Tensor:
        """The kept ids of a chunk [n,K]."""
        return self.ids_NK[rows]

    def at(self, rows: slice, *, vocabulary: int) -> Callable[[float], Buckets]:
        """The teacher's buckets of a chunk as a function of the temperature.

        A student whose whole `vocabulary` is kept has no tail; the mass of a larger teacher's
        padding rows, which it cannot hold, is then left out and the kept ids share it.
        """

        def buckets(temperature: float) -> Buckets:
            log_tail_n = self.log_tail_NS[rows, self.temperatures.index(temperature)]
            if self.renormalised or self.num_ids >= vocabulary:
                log_tail_n = torch.full_like(log_tail_n, -torch.inf)
            return teacher_distribution(self.logprobs_NK[rows], log_tail_n, temperature=temperature)

        return buckets

    def label_logprob(self, rows: slice, label_n: Tensor, teacher: Buckets) -> Tensor:
        """The label's log-probability [n], as shipped."""
        assert self.label_logprob_N is not None, "atkd needs the label's log-probability"
        return self.label_logprob_N[rows]

    def captured_mass(self) -> Tensor:
        """Teacher mass on the kept ids at temperature 1 [N], from the exact tail."""
        return -torch.expm1(self.log_tail_NS[:, self.temperatures.index(1.0)])


Targets = TeacherTargets | TeacherStates | DrawnTargets
Pairs = Callable[[float], tuple[Buckets, Buckets]]  # temperature -> teacher, student of a chunk


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """A micro-batch's loss and what there is to report about each of its tokens."""

    loss: Tensor  # scalar with a gradient: multiplier x weighted sum
    terms: dict[str, Tensor]  # name -> [N], unweighted, nats (hidden states: no unit)
    label_nll_N: Tensor  # cross-entropy of the text's own next token, nats
    # Bucketed KL(teacher || student) at temperature 1, of drawn ids its unbiased estimate at
    # theirs; None: no teacher.
    kl_N: Tensor | None
    captured_mass_N: Tensor | None  # teacher mass on the kept ids; None: no teacher
    unseen_mass_N: Tensor | None  # student mass outside the kept ids; None: no teacher
    adaptive: dict[str, Tensor] = field(default_factory=dict)  # `ADAPTIVE` -> [N]; or empty


def token_losses(
    hidden_ND: Tensor,
    head: Head,
    *,
    label_N: Tensor,
    terms: Sequence[Any],
    multiplier: float | Tensor = 1.0,
    targets: Targets | None = None,
    hidden_states: HiddenStatePairs | None = None,
    classes: TokenClasses | None = None,
    teacher_share: float = 1.0,
    chunk_rows: int | None = None,
) -> TokenLosses:
    """Evaluate all terms on the states at the positions with loss.

    A term has `kind` and `weight`; a divergence also `temperature`, `times_temperature_squared`
    and its parameters, but for taid's `teacher_share`, which moves from step to step; hidden
    states `layers` and `distance`; atkd `direction`. Terms that learn from the teacher need
    `targets`, or `hidden_states` respectively; atkd also the teacher's label log-probabilities
    and `classes`, whose weights its values include. The gradient is that of the weighted sum of
    the terms, for hidden states, head and projections.
    """
    objective = WeightedTerms(
        tuple(term for term in terms if term.kind != "hidden_states"),
        label_N=label_N,
        targets=targets,
        multiplier=multiplier,
        vocabulary=head.vocabulary,
        classes=classes,
        teacher_share=teacher_share,
    )
    loss, values_NJ = fused_token_loss(hidden_ND, head, objective=objective, chunk_rows=chunk_rows)
    columns = iter(values_NJ.unbind(-1))
    label_nll_N, kl_N, unseen_N = next(columns), next(columns), next(columns)
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
        captured_mass_N=None if targets is None else targets.captured_mass(),
        unseen_mass_N=None if targets is None else unseen_N,
        adaptive=dict(zip(ADAPTIVE, columns, strict=True)) if objective.is_adaptive else {},
    )


@torch.no_grad()
def evaluate_tokens(
    hidden_ND: Tensor,
    head: Head,
    *,
    label_N: Tensor,
    targets: Targets | None = None,
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


def term_names(terms: Sequence[Any]) -> list[str]:
    """One name per term: its kind, numbered from the second of a kind on."""
    kinds = [term.kind for term in terms]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return [k if count == 1 else f"{k}_{count}" for k, count in zip(kinds, counts, strict=True)]


@dataclass(frozen=True, slots=True)
class WeightedTerms:
    """The terms on logits as a function of log-probabilities of kept ids and the label.

    Values: label NLL, KL and the student's unseen mass at temperature 1 (0 without targets), one
    per term, and `ADAPTIVE` where a term is atkd.
    """

    terms: Sequence[Any]
    label_N: Tensor
    targets: Targets | None
    multiplier: float | Tensor
    vocabulary: int  # V
    classes: TokenClasses | None = None
    teacher_share: float = 1.0
    temperatures: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = {term.temperature for term in self.terms if term.kind in DIVERGENCES}
        assert self.targets is not None or not any(t.kind in DIVERGENCES for t in self.terms), (
            "a divergence needs the teacher's targets"
        )
        assert not self.is_adaptive or (self.targets is not None and self.classes is not None), (
            "atkd needs the teacher's targets and the split"
        )
        wanted = (wanted | {self.reported_temperature}) - {1.0}
        object.__setattr__(self, "temperatures", (1.0, *sorted(wanted)))

    @property
    def reported_temperature(self) -> float:
        """That of the KL and the unseen mass: 1, or the one that ids are drawn at."""
        return self.targets.temperature if isinstance(self.targets, DrawnTargets) else 1.0

    @property
    def is_adaptive(self) -> bool:
        """Whether a term is atkd, which tells the label from the tail."""
        return any(term.kind == "atkd" for term in self.terms)

    @property
    def num_ids(self) -> int:
        """The kept ids and the label."""
        return 1 if self.targets is None else self.targets.num_ids + 1

    @property
    def num_values(self) -> int:
        """Three diagnostics, the terms, and what atkd reports."""
        return 3 + len(self.terms) + len(ADAPTIVE) * self.is_adaptive

    @property
    def kept_prefix(self) -> int | None:
        """K where the teacher's whole distribution over the shared ids is known, else None."""
        return self.targets.num_ids if isinstance(self.targets, TeacherStates) else None

    def select(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The label rides along as the last id, not kept, whether or not it is among the others.

        With atkd it is kept where it is not: the tail is then over the complement of both.
        """
        ids_nM = self.label_N[rows, None]
        if self.targets is not None:
            ids_nM = torch.cat([self.targets.ids(rows), ids_nM], dim=1)
        kept_nM = torch.ones_like(ids_nM, dtype=torch.bool)
        kept_nM[:, -1] = ~self._is_label(rows).any(-1) if self.is_adaptive else False
        if isinstance(self.targets, DrawnTargets):
            kept_nM[:, :-1] = self.targets.kept(rows)
        return ids_nM, kept_nM

    def teacher_logits(self, rows: slice, *, buffer: Tensor | None) -> Tensor | None:
        """Of a chunk, where the teacher ships its states; see `fused.TokenObjective`."""
        if not isinstance(self.targets, TeacherStates):
            return None
        return self.targets.logits(rows, buffer=buffer)

    def evaluate(
        self, rows: slice, student: Sequence[LogProbs], teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and unweighted values of a chunk, or a part of it."""
        pairs = self._pairs(rows, student, teacher_logits)
        nll_n = -self._label_logprob(rows, student[0])
        loss_n, values = torch.zeros_like(nll_n), []
        parts = [self._decoupled(rows, student[0], pairs)] if self.is_adaptive else []
        for term in self.terms:
            if term.kind == "cross_entropy":
                value_n = nll_n
            elif term.kind == "atkd":
                value_n = self._adaptive(parts[0], rows)
            else:
                value_n = self._soft(term, pairs)
            loss_n = loss_n + self.multiplier * term.weight * value_n
            values.append(value_n)
        for part in parts:
            values += self._reported(part, rows)
        kl_n = unseen_n = torch.zeros_like(nll_n)
        if self.targets is not None:
            kl_n, unseen_n = self._reported_distance(pairs, values)
        return loss_n, torch.stack([nll_n, kl_n, unseen_n, *values], dim=-1)

    def _reported_distance(self, pairs: Pairs, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """KL and the student's unseen mass, without a gradient; the KL is a term's own value where
        there is one."""
        temperature = self.reported_temperature
        teacher, own = pairs(temperature)
        known = [
            value_n.detach()
            for term, value_n in zip(self.terms, values, strict=False)
            if term.kind == "forward_kl" and term.temperature == temperature == 1
        ]
        with torch.no_grad():
            kl_n = known[0] if known else _distance("forward_kl", teacher, own)
            return kl_n, own.tail_N.exp()

    def _soft(self, term: Any, pairs: Pairs) -> Tensor:
        names = DIVERGENCES[term.kind].parameters
        parameters = {name: self._parameter(term, name) for name in names}
        value_n = _distance(term.kind, *pairs(term.temperature), **parameters)
        return value_n * term.temperature**2 if term.times_temperature_squared else value_n

    def _parameter(self, term: Any, name: str) -> Any:
        """From the config, but for the one that is the step's."""
        return self.teacher_share if name == "teacher_share" else getattr(term, name)

    def _adaptive(self, parts: Decoupled, rows: slice) -> Tensor:
        assert self.classes is not None
        return self.classes.weight_N[rows] * parts.loss(self.classes.hard_N[rows])

    def _reported(self, parts: Decoupled, rows: slice) -> list[Tensor]:
        """In the order of `ADAPTIVE`."""
        assert self.classes is not None
        hard_n = self.classes.hard_N[rows].to(parts.tkd_N.dtype)
        return [hard_n, parts.uncertainty_N, parts.tkd_N, parts.dkd_N]

    def _decoupled(self, rows: slice, probs: LogProbs, pairs: Pairs) -> Decoupled:
        """Teacher against student with the label on its own, or in reverse."""
        assert self.targets is not None
        assert not isinstance(self.targets, DrawnTargets)
        is_label_nK, (buckets, _) = self._is_label(rows), pairs(1.0)
        ids_nM = probs.ids_nM
        if self.kept_prefix is not None:
            ids_nM = torch.cat([ids_nM, self._label_logprob(rows, probs)[:, None]], dim=1)
        own = labelled_student(ids_nM, probs.tail_n, is_label_NK=is_label_nK)
        label_n = self.targets.label_logprob(rows, self.label_N[rows], buckets)
        teacher = labelled_teacher(
            buckets,
            label_logprob_N=label_n.to(probs.tail_n.dtype),
            is_label_NK=is_label_nK,
            student_tail_N=probs.tail_n.detach(),
        )
        if any(term.kind == "atkd" and term.direction == "reverse" for term in self.terms):
            return decoupled(own, teacher)
        return decoupled(teacher, own)

    def _label_logprob(self, rows: slice, probs: LogProbs) -> Tensor:
        """The student's, of the label [n]: the last column, or one of a whole vocabulary's."""
        if self.kept_prefix is None:
            return probs.ids_nM[:, -1]
        return probs.ids_nM.gather(1, self.label_N[rows, None])[:, 0]

    def _is_label(self, rows: slice) -> Tensor:
        """Which kept ids are the label, bool [n,K]."""
        assert self.targets is not None
        return self.targets.ids(rows) == self.label_N[rows, None]

    def _pairs(
        self, rows: slice, student: Sequence[LogProbs], teacher_logits: Tensor | None
    ) -> Pairs:
        """Teacher and student of a chunk at a temperature, over the same kept ids and tail."""

        @cache
        def pair(temperature: float) -> tuple[Buckets, Buckets]:
            assert teacher is not None
            probs = student[self.temperatures.index(temperature)]
            if self.kept_prefix is not None:
                return teacher(temperature), Buckets(probs.ids_nM, probs.tail_n)
            tail_n = probs.tail_n
            if self.is_adaptive:
                inside_n = self._is_label(rows).any(-1)
                tail_n = torch.where(inside_n, tail_n, torch.logaddexp(tail_n, probs.ids_nM[:, -1]))
            return teacher(temperature), Buckets(probs.ids_nM[:, :-1], tail_n)

        teacher = self._teacher(rows, teacher_logits)
        return pair

    def _teacher(
        self, rows: slice, teacher_logits: Tensor | None
    ) -> Callable[[float], Buckets] | None:
        """The teacher's buckets of a chunk as a function of the temperature."""
        if isinstance(self.targets, TeacherStates):
            assert teacher_logits is not None
            return self.targets.at(
                teacher_logits, vocabulary=self.vocabulary, temperatures=self.temperatures
            )
        return self.targets and self.targets.at(rows, vocabulary=self.vocabulary)


def _distance(kind: str, teacher: Buckets, student: Buckets, **parameters: Any) -> Tensor:
    """A divergence of the registry [n], estimated where ids are drawn."""
    divergence = DIVERGENCES[kind]
    if not isinstance(teacher, DrawnBuckets):
        return divergence.function(teacher, student, **parameters)
    assert divergence.drawn is not None, f"{kind} needs both distributions at the same ids"
    return divergence.drawn(teacher, student)
