"""What the student is trained on: one module from the tensors of a unit to a loss and its sums.

The whole loss runs inside its forward, so that the engine sees every use of every weight. Nothing
of size [B, T, V] is ever made.

B lines   T tokens   N positions with loss   D student width   E teacher width   V vocabulary
M ids that the student names
G domains in config order
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shared.config.run import Config
from shared.targets.asks.kept_ids import LikeliestIds
from student_trainer.accelerator import deepspeed
from student_trainer.answers import Reading, view_of
from student_trainer.losses.across.reading import compared, of_student
from student_trainer.losses.auxiliary.auxiliary import MOVED, with_auxiliaries
from student_trainer.losses.auxiliary.hidden_states import projection
from student_trainer.losses.auxiliary.moving import moved_output
from student_trainer.losses.auxiliary.self_features import own_projections
from student_trainer.losses.in_phase import PhaseLosses
from student_trainer.losses.kernel.averaged import AveragedHeads
from student_trainer.losses.kernel.entropy import entropies
from student_trainer.losses.kernel.likeliest import likeliest_ids, likeliest_logprobs
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets
from student_trainer.losses.kernel.teacher_states import TeacherHead
from student_trainer.losses.kernel.top1 import Top1, top1
from student_trainer.losses.parts import BatchPart, in_order, parts_of, put_together
from student_trainer.losses.terms.token_temperature import Hellinger
from student_trainer.losses.token_losses import (
    CHANGED,
    WRITTEN,
    TokenLosses,
    evaluate_tokens,
    foreign_labels,
    token_losses,
    weighted,
)
from student_trainer.metrics.sums import EXPERT_TOKENS, POLICY, ROLLOUTS, SumLayout
from student_trainer.models.student import Student
from student_trainer.sources.batches import Batch
from student_trainer.weighing.weighting import PositionWeights, Seen, Weighting

Mode = Literal["train", "evaluate", "measure", "logits", "likeliest", "spread", "look"]

# What mode `measure` tells of each position: nats, KL(teacher || student) or 0 without a teacher,
# and of the likeliest ids their probability, whether they are the label, and which they are.
MEASURED = (
    "student_nll",
    "kl",
    "student_confidence",
    "student_right",
    "student_choice",
    "teacher_confidence",
    "teacher_right",
    "teacher_choice",
)


class Objective(nn.Module):
    """Student and losses as one module."""

    def __init__(
        self,
        student: Student,
        config: Config,
        *,
        teacher_width: int | None,
        teacher_heads: Mapping[str, TeacherHead | AveragedHeads] | None = None,
    ) -> None:
        super().__init__()
        self.student = student.saved
        self.loss_head = LossHead(
            student, config, teacher_width=teacher_width, teacher_heads=teacher_heads or {}
        )
        self._student = (student,)  # in a tuple: registered once, below `student`

    def probe(self, device: torch.device, *, tokens: int) -> Batch:
        """A batch by which an export is compared with the student."""
        return self._student[0].probe(device, tokens=tokens)

    def forward(
        self,
        batch: Batch,
        *,
        mode: Mode = "train",
        multiplier: float = 1.0,
        phase: int = 0,
        teacher_share: float = 1.0,
        weighting: Weighting | None = None,
        asked: LikeliestIds | None = None,
        looks: tuple[str, ...] = (),
    ) -> tuple[Tensor, ...]:
        """`train`: the loss of the unit times `multiplier`, sums to report float64 as `SumLayout`
        has them, and the weighted loss of each position [N]. `phase` decides the weights of losses,
        `teacher_share` is the t of TAID; `weighting` says what each position counts.
        `evaluate`: label NLL and KL by domain, float64 [2, G].
        `measure`: the same, and the `MEASURED` of each position, float64 [8, N].
        `logits`: the logits [N, V] at the positions with loss, for probes of a few tokens.
        `likeliest`: the ids that the student names for `asked` [N, M].
        `spread`: as many of its likeliest ids as `asked` has ids [N, M], and the log-probabilities
        of each and of all others together [N, M + 1], nats.
        `look`: each of `looks`, as `weigher.Look` has them, at the positions with loss [N].
        """
        picking = self.loss_head.losses_in[phase].auxiliaries.values() if mode == "train" else ()
        options = {option: True for auxiliary in picking for option in auxiliary.needs.options}
        output, hidden_ND = self._student[0].outputs(batch, options)
        for auxiliary in picking:
            batch = batch | auxiliary.pick(output, batch)
            if size := auxiliary.needs.moved_by:
                moved = moved_output(self._student[0], batch, options, size=size)
                own = auxiliary.pick(moved, batch)
                batch = batch | {MOVED + name: value for name, value in own.items()}
        return self.loss_head(
            hidden_ND,
            batch,
            mode=mode,
            multiplier=multiplier,
            phase=phase,
            teacher_share=teacher_share,
            weighting=weighting,
            asked=asked,
            looks=looks,
        )


class LossHead(nn.Module):
    """Output head and losses. Under ZeRO-3 the head is gathered when this module is entered,
    once per micro-batch, and stays whole until its gradient is formed."""

    def __init__(
        self,
        student: Student,
        config: Config,
        *,
        teacher_width: int | None,
        teacher_heads: Mapping[str, TeacherHead | AveragedHeads],
    ) -> None:
        super().__init__()
        self.layout = SumLayout.of(config, routers=student.routers)
        self.temperatures = config.temperatures
        self._renormalised = config.targets.renormalised
        self._by_rank = config.cross_tokenizer == "uld"
        self._student = (student,)
        self._teacher_heads = dict(teacher_heads)  # by teacher; neither trained, cast nor saved
        for parameter in student.read_by_losses:
            deepspeed.zero.register_external_parameter(self, parameter)
        matched = config.hidden_layers
        assert not matched or teacher_width is not None, "the plan knows the teacher's width"
        torch.manual_seed(config.seed)  # so that a run's projections start alike every time
        self.projections = nn.ModuleDict(
            {str(layer): projection(student.state_width, teacher_width or 0) for layer in matched}
        )
        self.projections.update(own_projections(config.losses, student.state_width))
        phases = config.progressive.phases if config.progressive else 1
        self.losses_in = [
            PhaseLosses(config.losses_in(phase), self.projections) for phase in range(phases)
        ]

    def forward(
        self,
        hidden_ND: Tensor,
        batch: Batch,
        *,
        mode: Mode,
        multiplier: float,
        phase: int,
        teacher_share: float,
        weighting: Weighting | None,
        asked: LikeliestIds | None,
        looks: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        """See `Objective.forward`."""
        head = self._student[0].output_head()
        if mode == "likeliest":
            assert asked is not None, "the ask says how many ids of which"
            count, vocabulary = asked.student_ids, asked.shared_vocab
            return (likeliest_ids(hidden_ND, head, count=count, shared_vocab=vocabulary),)
        if mode == "spread":
            assert asked is not None, "the ask says how many ids of which"
            count, vocabulary = asked.num_ids, asked.shared_vocab
            return likeliest_logprobs(hidden_ND, head, count=count, shared_vocab=vocabulary)
        if mode == "look":
            return tuple(self._look(name, hidden_ND, head, batch) for name in looks)
        if mode == "logits":
            return (head.logits(hidden_ND),)
        by_rank = self._by_rank and mode == "train"
        batch = batch | of_student(hidden_ND, head, batch, by_rank=by_rank)
        if mode == "evaluate":
            nll_kl_2N = self._evaluated(hidden_ND, head, batch)
            return (self._summed(nll_kl_2N, batch),)
        if mode == "measure":
            nll_kl_2N = self._evaluated(hidden_ND, head, batch)
            tops_6N = self._tops(hidden_ND, head, batch)
            return self._summed(nll_kl_2N, batch), torch.cat([nll_kl_2N.double(), tops_6N])
        losses, parts = self.losses_in[phase], parts_of(batch)
        counted = self._counted(weighting, hidden_ND, head, batch) if weighting else None
        counts = losses.counts(batch.get("weight_N"), counted)
        scaled = {"multiplier": multiplier, "moving": {"teacher_share": teacher_share}}
        each = [self._learnt(part, hidden_ND, head, losses, counts, **scaled) for part in parts]
        found = put_together(parts, each)
        weighted_N = _weighted(found, losses.weights, counts)
        reports = found.reports | (counted.reported_with(counts) if counted else {})
        reports |= compared(batch)
        sums = self._sums(found, reports, weighted_N, batch, policy_F=counted and counted.policy_F)
        return found.loss, sums, weighted_N

    def _learnt(
        self,
        part: BatchPart,
        hidden_ND: Tensor,
        head: Head,
        losses: PhaseLosses,
        counts: Mapping[str, Tensor],
        *,
        multiplier: float,
        moving: Mapping[str, float],
    ) -> TokenLosses:
        """The losses of a part of the batch."""
        weights = {name: part.of(weight_N) for name, weight_N in counts.items()}
        found = token_losses(
            part.of(hidden_ND),
            head,
            label_N=part.batch["label_N"],
            terms=losses.terms,
            multiplier=multiplier,
            weights=weights,
            targets=self._targets(part, self.temperatures, renormalised=self._renormalised),
            columns=part.batch,
            moving=moving,
        )
        return with_auxiliaries(
            found, losses.auxiliaries, part.batch, multiplier=multiplier, weights=weights
        )

    @torch.no_grad()
    def _counted(
        self, weighting: Weighting, hidden_ND: Tensor, head: Head, batch: Batch
    ) -> PositionWeights:
        """What the positions of a batch count; the student's states are those that it learns
        from."""
        parts = parts_of(batch)
        entropies = [part.batch["entropy_N"] for part in parts if "entropy_N" in part.batch]
        return weighting.weights(
            Seen(
                label_logprob_N=batch["label_logprob_N"],
                captured_mass=lambda: self._captured_mass(parts),
                teacher_top1=lambda: self._teacher_top1(parts),
                entropy_N=in_order(parts, entropies) if len(entropies) == len(parts) else None,
                student={n: self._look(n, hidden_ND, head, batch) for n in sorted(weighting.looks)},
                domain_N=batch["domain_N"],
                document_N=batch["document_N"],
                changed_N=batch.get(CHANGED),
                vocabulary=head.vocabulary,
            )
        )

    def _captured_mass(self, parts: list[BatchPart]) -> Tensor | None:
        """What the teachers' kept ids hold at each position [N]; None where one keeps none."""
        views = [self._targets(part, self.temperatures) for part in parts]
        masses = [view.captured_mass() for view in views if view is not None]
        return in_order(parts, masses) if len(masses) == len(parts) else None

    def _teacher_top1(self, parts: list[BatchPart]) -> Top1 | None:
        """What the teachers think likeliest at each position; None where one does not say."""
        views = [(self._targets(part, (1.0,)), part.batch["label_N"]) for part in parts]
        found = [view and view.top1(label_P) for view, label_P in views]
        known = [top for top in found if top is not None]
        if len(known) < len(parts):
            return None
        return Top1(*(in_order(parts, values) for values in zip(*known, strict=True)))

    def _evaluated(self, hidden_ND: Tensor, head: Head, batch: Batch) -> Tensor:
        parts, nlls, kls = parts_of(batch), [], []
        for part in parts:
            targets, label_P = self._targets(part, (1.0,)), part.batch["label_N"]
            nll_P, kl_P = evaluate_tokens(
                part.of(hidden_ND), head, label_N=label_P, targets=targets
            )
            nlls.append(nll_P)
            kls.append(torch.zeros_like(nll_P) if kl_P is None else kl_P)
        return torch.stack([in_order(parts, nlls), in_order(parts, kls)])

    def _summed(self, nll_kl_2N: Tensor, batch: Batch) -> Tensor:
        return torch.stack([self._by_domain(v, batch["domain_N"]) for v in nll_kl_2N])

    def _tops(self, hidden_ND: Tensor, head: Head, batch: Batch) -> Tensor:
        """The last six of `MEASURED`, NaN where a teacher does not say, float64 [6, N]."""
        parts, found = parts_of(batch), []
        for part in parts:
            label_P = part.batch["label_N"]
            own = top1(part.of(hidden_ND), head, label_P)
            targets = self._targets(part, (1.0,))
            taught = None if targets is None else targets.top1(label_P)
            absent = (torch.full_like(own.confidence_N, torch.nan),) * len(own)
            found.append([value_P.double() for value_P in (*own, *(taught or absent))])
        return torch.stack([in_order(parts, value_P) for value_P in zip(*found, strict=True)])

    def _targets(
        self, part: BatchPart, temperatures: tuple[float, ...], *, renormalised: bool = False
    ) -> Targets | None:
        """What a part's teacher says, before its own head where it ships states."""
        heads = self._teacher_heads
        head = next(iter(heads.values()), None) if part.teacher is None else heads.get(part.teacher)
        return view_of(part.batch, Reading(temperatures, head, renormalised))

    def _look(self, name: str, hidden_ND: Tensor, head: Head, batch: Batch) -> Tensor:
        """One of `weigher.Look` [N]."""
        if name == "entropy":
            return entropies(hidden_ND, head)
        if name == "label_logprob":
            return -evaluate_tokens(hidden_ND, head, label_N=batch["label_N"])[0]
        assert name == "hellinger", name
        parts, found = parts_of(batch), []
        for part in parts:
            looked = token_losses(
                part.of(hidden_ND),
                head,
                label_N=part.batch["label_N"],
                terms={name: Hellinger()},
                targets=self._targets(part, self.temperatures, renormalised=self._renormalised),
            )
            found.append(looked.terms[name])
        return in_order(parts, found)

    @torch.no_grad()
    def _sums(
        self,
        found: TokenLosses,
        reports: Mapping[str, Tensor],
        weighted_N: Tensor,
        batch: Batch,
        *,
        policy_F: Tensor | None,
    ) -> Tensor:
        absent_N = torch.zeros_like(weighted_N)
        excess_N = absent_N
        if "label_logprob_N" in batch:
            excess_N = (found.label_nll_N + batch["label_logprob_N"]).clamp(min=0)
        foreign_N = foreign_labels(batch)
        if foreign_N is not None:
            excess_N = excess_N.masked_fill(foreign_N, 0.0)
        totals = {
            "loss": weighted_N,
            "captured_mass": found.captured_mass_N,
            "unseen_mass": found.unseen_mass_N,
            **{f"losses.{name}": found.terms[name] for name in self.layout.losses},
            **self._rollout_sums(found.label_nll_N, batch),
        }
        by_domain = dict.fromkeys(self.layout.reports, absent_N) | dict(reports)
        by_domain |= {"kl": found.kl_N, "excess": excess_N}
        present = {name: absent_N if v is None else v for name, v in (totals | by_domain).items()}
        sums = {
            name: self._by_domain(value_N, batch["domain_N"])
            if name in by_domain
            else value_N.double().sum()
            for name, value_N in present.items()
        }
        if "expert_tokens_LE" in batch:
            sums[EXPERT_TOKENS] = batch["expert_tokens_LE"]
        if policy_F is not None:
            sums[POLICY] = policy_F
        return self.layout.joined(sums)

    def _rollout_sums(self, label_nll_N: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`sums.ROLLOUTS` of each position, where the student writes rows."""
        if not self.layout.writes:
            return {}
        written_N = batch.get(WRITTEN)
        if written_N is None:
            return dict.fromkeys(ROLLOUTS, torch.zeros_like(label_nll_N))
        ratio_N = (-label_nll_N - batch["behaviour_N"]).exp().masked_fill(~written_N, 0.0)
        return dict(zip(ROLLOUTS, (written_N, ratio_N), strict=True))

    def _by_domain(self, value_N: Tensor, domain_N: Tensor) -> Tensor:
        size = self.layout.num_domains
        sums_G = torch.zeros(size, dtype=torch.float64, device=value_N.device)
        return sums_G.index_add_(0, domain_N, value_N.detach().double())


@torch.no_grad()
def _weighted(
    found: TokenLosses, weights: Mapping[str, float], counts: Mapping[str, Tensor]
) -> Tensor:
    weighted_N = torch.zeros_like(found.label_nll_N)
    for name, weight in weights.items():
        weighted_N = weighted_N + weight * weighted(found.terms[name], counts.get(name))
    return weighted_N
