"""What the trainer optimises: a weighted sum of terms, in nats per token, and what it reports.

Values per token are unweighted, without mask or mean; the one reduction is `multiplier x sum over
tokens`, with the multiplier the trainer derives from the whole step.

N positions   n positions of a chunk   K ids kept per position   M kept ids and the label
J values per position   V student vocabulary
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from student_trainer.losses.across.spans import Spans
from student_trainer.losses.kernel.buckets import Buckets
from student_trainer.losses.kernel.chunk import LogProbs
from student_trainer.losses.kernel.fused import fused_token_loss
from student_trainer.losses.kernel.labelled import (
    LabelledBuckets,
    labelled_student,
    labelled_teacher,
)
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets
from student_trainer.losses.terms.divergences import DIVERGENCES
from student_trainer.losses.terms.term import ChunkView, Pairs, Term, TermValues

NOTHING: Mapping = {}
FORWARD_KL = DIVERGENCES["forward_kl"]
CHANGED = "changed_N"  # int64: the number of the changed document that it stands in, else 0
WRITTEN = "written_N"  # bool, by the column's name: whether the student wrote the label itself


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """A micro-batch's loss and what there is to report about each of its tokens."""

    loss: Tensor  # scalar with a gradient: multiplier x weighted sum
    terms: dict[str, Tensor]  # name -> [N], unweighted, nats (of auxiliaries: no unit)
    label_nll_N: Tensor  # cross-entropy of the text's own next token, nats
    # Bucketed KL(teacher || student) at temperature 1, of drawn ids its unbiased estimate at
    # theirs; None: no teacher.
    kl_N: Tensor | None
    captured_mass_N: Tensor | None  # teacher mass on the kept ids; None: no teacher
    unseen_mass_N: Tensor | None  # student mass outside the kept ids; None: no teacher
    reports: dict[str, Tensor]  # what terms report beside their values, by name -> [N]


def token_losses(
    hidden_ND: Tensor,
    head: Head,
    *,
    label_N: Tensor,
    terms: Mapping[str, Term],
    multiplier: float = 1.0,
    weights: Mapping[str, Tensor] = NOTHING,
    targets: Targets | None = None,
    columns: Mapping[str, Tensor] = NOTHING,
    moving: Mapping[str, float] = NOTHING,
    chunk_rows: int | None = None,
) -> TokenLosses:
    """Evaluate all terms on the states at the positions with loss.

    `weights` [N] says by name of a term how often each position counts in it, 1 by default,
    negative allowed. Terms that compare with the teacher's ids need `targets`; `columns` [N] and
    `moving` hold what terms read of the step by name, and `written_N` where the student wrote
    labels. The gradient is that of the weighted sum of the terms, for hidden states and head.
    """
    objective = WeightedTerms(
        terms,
        label_N=label_N,
        targets=targets,
        multiplier=multiplier,
        weights=weights,
        vocabulary=head.vocabulary,
        columns=columns,
        moving=moving,
    )
    loss, values_NJ = fused_token_loss(hidden_ND, head, objective=objective, chunk_rows=chunk_rows)
    columns_J = iter(values_NJ.unbind(-1))
    label_nll_N, kl_N, unseen_N = next(columns_J), next(columns_J), next(columns_J)
    values = {name: next(columns_J) for name in terms}
    return TokenLosses(
        loss=loss,
        terms=values,
        label_nll_N=label_nll_N,
        kl_N=None if targets is None else kl_N,
        captured_mass_N=None if targets is None else targets.captured_mass(),
        unseen_mass_N=None if targets is None else unseen_N,
        reports=dict(zip(objective.reported, columns_J, strict=True)),
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
        hidden_ND, head, label_N=label_N, terms={}, targets=targets, chunk_rows=chunk_rows
    )
    return found.label_nll_N, found.kl_N


def foreign_labels(columns: Mapping[str, Tensor]) -> Tensor | None:
    """Which labels are not those of a text, but what the student wrote or of a changed document,
    bool [N]; None where all are."""
    written_N, changed_N = columns.get(WRITTEN), columns.get(CHANGED)
    return written_N if changed_N is None else changed_N != 0


def weighted(value_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Values times what their positions count; as they are without weights."""
    return value_N if weight_N is None else weight_N.to(value_N.dtype) * value_N


@dataclass(frozen=True, slots=True)
class WeightedTerms:
    """The terms as a function of log-probabilities of kept ids and the label: `TokenObjective`.

    Values: label NLL, KL and the student's unseen mass at temperature 1 (0 without targets), one
    per term, and what the terms report.
    """

    terms: Mapping[str, Term]
    label_N: Tensor
    targets: Targets | None
    multiplier: float
    weights: Mapping[str, Tensor]
    vocabulary: int  # V
    columns: Mapping[str, Tensor]
    moving: Mapping[str, float]
    temperatures: tuple[float, ...] = field(init=False)
    label_apart: bool = field(init=False)  # whether a term tells the label from the tail
    columns_read: tuple[str, ...] = field(init=False)
    reported: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        needs = [term.needs for term in self.terms.values()]
        for name, needed in zip(self.terms, needs, strict=True):
            assert self.targets is not None or not needed.teacher, f"{name} needs targets"
            missing = set(needed.columns) - set(self.columns)
            assert not missing, f"{name} needs {missing} of the step"
        found = {temperature for needed in needs for temperature in needed.temperatures}
        found = (found | {self.reported_temperature}) - {1.0}
        object.__setattr__(self, "temperatures", (1.0, *sorted(found)))
        object.__setattr__(self, "label_apart", any(needed.label_apart for needed in needs))
        read = tuple(dict.fromkeys(name for needed in needs for name in needed.columns))
        object.__setattr__(self, "columns_read", read)
        reported = tuple(name for term in self.terms.values() for name in term.reported)
        object.__setattr__(self, "reported", reported)

    @property
    def reported_temperature(self) -> float:
        """That of the KL and the unseen mass."""
        return 1.0 if self.targets is None else self.targets.reported_temperature

    @property
    def num_ids(self) -> int:
        """The kept ids and the label."""
        return 1 if self.targets is None else self.targets.num_ids + 1

    @property
    def num_values(self) -> int:
        """Three diagnostics, the terms, and what they report."""
        return 3 + len(self.terms) + len(self.reported)

    @property
    def kept_prefix(self) -> int | None:
        """K where the teacher's whole distribution over the shared ids is known, else None."""
        return None if self.targets is None else self.targets.kept_prefix

    @property
    def group_V(self) -> Tensor | None:
        """The groups of the student's ids, where the teacher's answer is about groups."""
        return None if self.targets is None else self.targets.groups()

    def select(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The label rides along as the last id, not kept, whether or not it is among the others.

        Where a term tells it from the tail, it is kept where it is not among them: the tail is
        then over the complement of both.
        """
        label_n1 = self.label_N[rows, None]
        apart_n1 = torch.zeros_like(label_n1, dtype=torch.bool)
        if self.targets is None:
            return label_n1, apart_n1
        if self.label_apart:
            apart_n1 = ~self._is_label(rows).any(-1, keepdim=True)
        ids_nM = torch.cat([self.targets.ids(rows), label_n1], dim=1)
        return ids_nM, torch.cat([self.targets.kept(rows), apart_n1], dim=1)

    def teacher_logits(self, rows: slice, *, buffer: Tensor | None) -> Tensor | None:
        """Of a chunk, where the teacher ships its states; see `fused.TokenObjective`."""
        return None if self.targets is None else self.targets.logits(rows, buffer=buffer)

    def evaluate(
        self, rows: slice, student: Sequence[LogProbs], teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and unweighted values of a chunk, or a part of it."""
        chunk = self._view(rows, student, teacher_logits)
        loss_n, found = torch.zeros_like(chunk.label_logprob_n), {}
        for name, term in self.terms.items():
            found[name] = self._of_text(term, term.evaluate(chunk), rows)
            weight_N = self.weights.get(name)
            weight_n = None if weight_N is None else weight_N[rows]
            values_n = weighted(found[name].values_n, weight_n)
            loss_n = loss_n + self.multiplier * term.weight * values_n
        values = [one.values_n for one in found.values()]
        values += [report for one in found.values() for report in one.reports.values()]
        first = (-chunk.label_logprob_n, *self._distance(chunk, found))
        return loss_n, torch.stack([*first, *values], dim=-1)

    def _of_text(self, term: Term, found: TermValues, rows: slice) -> TermValues:
        """A term's values, 0 at labels that are not the text's where it needs those."""
        foreign_N = foreign_labels(self.columns)
        if foreign_N is None or not term.needs.text:
            return found
        return replace(found, values_n=found.values_n.masked_fill(foreign_N[rows], 0.0))

    def _distance(self, chunk: ChunkView, found: Mapping[str, TermValues]) -> tuple[Tensor, Tensor]:
        """KL and the student's unseen mass, without a gradient; the KL is a term's own value where
        there is one, and both are 0 without targets."""
        if self.targets is None:
            none_n = torch.zeros_like(chunk.label_logprob_n)
            return none_n, none_n
        temperature = self.reported_temperature
        _, own = chunk.pair(temperature)
        known = [found[n].values_n for n, t in self.terms.items() if t.is_kl_at == temperature]
        with torch.no_grad():
            kl_n = known[0].detach() if known else chunk.compared(FORWARD_KL.of, temperature)
            return kl_n, own.tail_N.exp()

    def _view(
        self, rows: slice, student: Sequence[LogProbs], teacher_logits: Tensor | None
    ) -> ChunkView:
        pair = self._pairs(rows, student, teacher_logits)
        label_n = self._label_logprob(rows, student[0])
        return ChunkView(
            label_logprob_n=label_n,
            pair=pair,
            labelled=self._labelled(rows, student[0], pair) if self.label_apart else None,
            columns={name: self.columns[name][rows] for name in self.columns_read},
            moving=self.moving,
            spans=self._spans(rows),
        )

    def _spans(self, rows: slice) -> Spans | None:
        return None if self.targets is None else self.targets.spans(rows)

    def _labelled(
        self, rows: slice, probs: LogProbs, pair: Pairs
    ) -> tuple[LabelledBuckets, LabelledBuckets]:
        """Teacher and student with the label on its own."""
        assert self.targets is not None
        is_label_nK, (buckets, _) = self._is_label(rows), pair(1.0)
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
        return teacher, own

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
        targets, teacher = self.targets, None
        if targets is not None:
            teacher = targets.at(
                rows, teacher_logits, vocabulary=self.vocabulary, temperatures=self.temperatures
            )

        @cache
        def pair(temperature: float) -> tuple[Buckets, Buckets]:
            assert targets is not None, "a term that compares needs targets"
            assert teacher is not None
            probs = student[self.temperatures.index(temperature)]
            if self.kept_prefix is not None:
                return teacher(temperature), Buckets(probs.ids_nM, probs.tail_n)
            tail_n = probs.tail_n
            if self.label_apart:
                inside_n = self._is_label(rows).any(-1)
                tail_n = torch.where(inside_n, tail_n, torch.logaddexp(tail_n, probs.ids_nM[:, -1]))
            own = Buckets(probs.ids_nM[:, :-1], tail_n)
            return teacher(temperature), targets.beside(rows, own)

        return pair
