"""What the student is trained on: one module from the tensors of a unit to a loss and its sums.

The whole loss runs inside its forward, so that the engine sees every use of every weight. Nothing
of size [B, T, V] is ever made.

B lines   T tokens   N positions with loss   D student width   E teacher width   V vocabulary
M ids that the student names   L losses
G domains in config order   Q quantities summed by domain
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from shared.config.losses import HiddenStates, Loss
from shared.config.run import Config
from shared.targets.kept_ids import LikeliestIds
from student_trainer.accelerator import deepspeed
from student_trainer.answers import Reading, view_of
from student_trainer.losses.auxiliary.hidden_states import (
    HiddenStatePairs,
    projection,
)
from student_trainer.losses.kernel.likeliest import likeliest_ids
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.teacher_states import TeacherHead
from student_trainer.losses.parts import BatchPart, in_order, parts_of, put_together
from student_trainer.losses.terms.token_adaptive import TokenClasses
from student_trainer.losses.token_losses import (
    ADAPTIVE,
    Targets,
    TokenLosses,
    evaluate_tokens,
    token_losses,
)
from student_trainer.models.student import Student, takes_positions
from student_trainer.sources.batches import Batch
from student_trainer.weighing.token_split import TokenSplit

Mode = Literal["train", "evaluate", "logits", "likeliest"]

# What training sums up for each domain, nats: KL(teacher || student), bucketed at temperature 1 or
# estimated from drawn ids at theirs, how far the student's NLL of the label exceeds the teacher's,
# never below 0, and what ATKD reports: hard tokens, their uncertainty, TKD and DKD (0 without it).
BY_DOMAIN = ("kl", "excess", *ADAPTIVE)


# What it sums up over all domains, before the losses: the weighted loss in nats, the teacher's mass
# on the kept ids (of drawn ones, what is not estimated), and the student's outside them, both at
# the temperature of the KL (0 without a teacher).
TOTALS = ("loss", "captured_mass", "unseen_mass")


class Objective(nn.Module):
    """Student and losses as one module."""

    def __init__(
        self,
        student: Student,
        config: Config,
        *,
        teacher_width: int | None,
        teacher_heads: Mapping[str, TeacherHead] | None = None,
    ) -> None:
        super().__init__()
        self.student = student.saved
        self.loss_head = LossHead(
            student, config, teacher_width=teacher_width, teacher_heads=teacher_heads or {}
        )
        self.vocab_size = student.vocab_size
        self._takes_positions = takes_positions(student.decoder)
        self._decoder = (student.decoder,)  # in a tuple: registered once, below `student`

    def forward(
        self,
        batch: Batch,
        *,
        mode: Mode = "train",
        multiplier: float = 1.0,
        phase: int = 0,
        teacher_share: float = 1.0,
        asked: LikeliestIds | None = None,
    ) -> tuple[Tensor, ...]:
        """`train`: the loss of the unit times `multiplier`, sums to report float64 [3+L+Q*G], and
        the weighted loss of each position [N]. The sums: `TOTALS`, each loss unweighted, then the
        Q quantities of `BY_DOMAIN` by domain; nats. `phase` decides the weights, `teacher_share`
        is the t of TAID.
        `evaluate`: label NLL and KL by domain, float64 [2, G].
        `logits`: the logits [N, V] at the positions with loss, for probes of a few tokens.
        `likeliest`: the ids that the student names for `asked` [N, M].
        """
        positions = {"position_ids": batch["position_ids_BT"]} if self._takes_positions else {}
        output = self._decoder[0](
            input_ids=batch["input_ids_BT"],
            **positions,
            use_cache=False,
            output_hidden_states=bool(self.loss_head.student_layers) and mode == "train",
        )
        index_N = batch["loss_index_N"]
        hidden_ND = output.last_hidden_state.flatten(0, 1)[index_N]
        inner_ND = {
            f"student_{layer}_ND": output.hidden_states[layer].flatten(0, 1)[index_N]
            for layer in (self.loss_head.student_layers if mode == "train" else ())
        }
        return self.loss_head(
            hidden_ND,
            batch | inner_ND,
            mode=mode,
            multiplier=multiplier,
            phase=phase,
            teacher_share=teacher_share,
            asked=asked,
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
        teacher_heads: Mapping[str, TeacherHead],
    ) -> None:
        super().__init__()
        phases = config.progressive.phases if config.progressive else 1
        self._terms_in_phase = [tuple(config.losses_in(phase)) for phase in range(phases)]
        self.temperatures = config.temperatures
        self._renormalised = config.targets.selector == "renormalised"
        self.num_domains = len(config.domains)
        self._atkd = config.atkd
        self._student = (student,)
        self._teacher_heads = dict(teacher_heads)  # by teacher; neither trained, cast nor saved
        for parameter in student.head.parameters():
            deepspeed.zero.register_external_parameter(self, parameter)
        matched = [term for term in config.losses if isinstance(term, HiddenStates)]
        self.student_layers = sorted({s for term in matched for s in term.layers.values()})
        assert not matched or teacher_width is not None, "the plan knows the teacher's width"
        torch.manual_seed(config.seed)  # so that a run's projections start alike every time
        self.projections = nn.ModuleDict(
            {
                str(layer): projection(student.width, teacher_width or 0)
                for layer in config.hidden_layers
            }
        )

    def forward(
        self,
        hidden_ND: Tensor,
        batch: Batch,
        *,
        mode: Mode,
        multiplier: float,
        phase: int,
        teacher_share: float,
        asked: LikeliestIds | None,
    ) -> tuple[Tensor, ...]:
        """See `Objective.forward`."""
        head = self._head()
        if mode == "likeliest":
            assert asked is not None, "the ask says how many ids of which"
            count, vocabulary = asked.student_ids, asked.shared_vocab
            return (likeliest_ids(hidden_ND, head, count=count, shared_vocab=vocabulary),)
        if mode == "logits":
            return (head.logits(hidden_ND),)
        if mode == "evaluate":
            return (self._evaluated(hidden_ND, head, batch),)
        terms = self._terms_in_phase[phase]
        parts = parts_of(batch | self._classes(hidden_ND, head, batch))
        each = [
            token_losses(
                part.of(hidden_ND),
                head,
                label_N=part.batch["label_N"],
                terms=terms,
                multiplier=multiplier,
                targets=self._targets(part, self.temperatures, renormalised=self._renormalised),
                hidden_states=self._pairs(part.batch),
                classes=_classes(part.batch),
                teacher_share=teacher_share,
            )
            for part in parts
        ]
        found = put_together(parts, each)
        weighted_N = _weighted(found, terms)
        return found.loss, self._sums(found, weighted_N, batch), weighted_N

    def _evaluated(self, hidden_ND: Tensor, head: Head, batch: Batch) -> Tensor:
        parts, nlls, kls = parts_of(batch), [], []
        for part in parts:
            targets, label_P = self._targets(part, (1.0,)), part.batch["label_N"]
            nll_P, kl_P = evaluate_tokens(
                part.of(hidden_ND), head, label_N=label_P, targets=targets
            )
            nlls.append(nll_P)
            kls.append(torch.zeros_like(nll_P) if kl_P is None else kl_P)
        columns = (in_order(parts, nlls), in_order(parts, kls))
        return torch.stack([self._by_domain(v, batch["domain_N"]) for v in columns])

    def _targets(
        self, part: BatchPart, temperatures: tuple[float, ...], *, renormalised: bool = False
    ) -> Targets | None:
        """What a part's teacher says, before its own head where it ships states."""
        heads = self._teacher_heads
        head = next(iter(heads.values()), None) if part.teacher is None else heads.get(part.teacher)
        return view_of(part.batch, Reading(temperatures, head, renormalised))

    @torch.no_grad()
    def _sums(self, found: TokenLosses, weighted_N: Tensor, batch: Batch) -> Tensor:
        absent_N = torch.zeros_like(weighted_N)
        captured_N = absent_N if found.captured_mass_N is None else found.captured_mass_N
        unseen_N = absent_N if found.unseen_mass_N is None else found.unseen_mass_N
        kl_N = absent_N if found.kl_N is None else found.kl_N
        excess_N = absent_N
        if "label_logprob_N" in batch:
            excess_N = (found.label_nll_N + batch["label_logprob_N"]).clamp(min=0)
        adaptive = [found.adaptive.get(name, absent_N) for name in ADAPTIVE]
        first = (weighted_N, captured_N, unseen_N, *found.terms.values())
        totals = [v.double().sum() for v in first]
        by_domain = [self._by_domain(v, batch["domain_N"]) for v in (kl_N, excess_N, *adaptive)]
        return torch.cat([torch.stack(totals), *by_domain])

    def _by_domain(self, value_N: Tensor, domain_N: Tensor) -> Tensor:
        sums_G = torch.zeros(self.num_domains, dtype=torch.float64, device=value_N.device)
        return sums_G.index_add_(0, domain_N, value_N.detach().double())

    @torch.no_grad()
    def _classes(self, hidden_ND: Tensor, head: Head, batch: Batch) -> Batch:
        """Nothing where the batch carries the step's split; in reverse one of this unit alone, from
        another pass over the head. The unit's class means are then its own, and the step's loss
        is the mean of its units' losses weighted by their tokens."""
        if self._atkd is None or self._atkd.direction == "forward":
            return {}
        nll_N, _ = evaluate_tokens(hidden_ND, head, label_N=batch["label_N"])
        split = TokenSplit.of(-nll_N.cpu().numpy(), hard_fraction=self._atkd.hard_fraction)
        return split.tensors(-nll_N, self._atkd)

    def _head(self) -> Head:
        student = self._student[0]
        linear = student.head
        return Head(linear.weight, linear.bias, student.logit_scale, student.soft_cap)

    def _pairs(self, batch: Batch) -> HiddenStatePairs | None:
        if not self.projections:
            return None
        student_ND = {layer: batch[f"student_{layer}_ND"] for layer in self.student_layers}
        teacher_NE = {int(name): batch[f"teacher_{name}_NE"] for name in self.projections}
        return HiddenStatePairs(student_ND, teacher_NE, self.projections)


def _classes(batch: Batch) -> TokenClasses | None:
    return TokenClasses(batch["hard_N"], batch["class_weight_N"]) if "hard_N" in batch else None


@torch.no_grad()
def _weighted(found: TokenLosses, terms: Sequence[Loss]) -> Tensor:
    weighted_N = torch.zeros_like(found.label_nll_N)
    for term, value_N in zip(terms, found.terms.values(), strict=True):
        weighted_N = weighted_N + term.weight * value_N
    return weighted_N
