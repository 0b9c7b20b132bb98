"""Weights of a whole step: against dense float64, whatever the cut.

N positions with loss of the step   V vocabulary
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shared.data.rows import Rows
from shared.targets.soft_targets import SoftTargets
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.weighing.weighed import looked, weighed_batches, weighers_of
from student_trainer.weighing.weigher import Columns, Look, StepView, UnitView, Weigher
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import question_of
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains
from tests.student_trainer.test_objective import CPU, unit

ROWS = 8
CUTS = {"whole": [0, 8], "halves": [0, 4, 8], "uneven": [0, 1, 6, 8], "rows": list(range(9))}
LAYOUTS = Layouts(DOMAINS, True, CPU, CAUSAL_LM)
every_cut = pytest.mark.parametrize("cut", CUTS)


@pytest.fixture(scope="module")
def teacher(tiny_pair: tiny.Pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


@dataclass(frozen=True)
class Learnt:
    """A step's loss, mean per token, its gradient, and its named sums."""

    loss: float
    gradient: dict[str, Tensor]
    sums: dict[str, float]


def objective_of(folder: Path, pair: tiny.Pair, losses: list[dict]) -> Objective:
    config = plan_of(folder / "run", pair, prepared_domains(folder), losses=losses).config
    return Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)


def cut_of(
    name: str, teacher: HFEngine, *, temperatures: tuple[float, ...] = (1.0,)
) -> list[tuple[Rows, SoftTargets | None]]:
    """The step's rows in units, each with the teacher's whole distribution."""
    rows = unit(0, count=ROWS)
    asked = {"temperatures": tuple(dict.fromkeys(temperatures)), "encoding": "fp32"}
    spec = question_of(top_k=tiny.VOCAB, shared_vocab=tiny.VOCAB, **asked)
    units = [rows.part(slice(*edges)) for edges in pairwise(CUTS[name])]
    return [(one, teacher.score(one, spec)) for one in units]


def learnt(
    objective: Objective, cut: list[tuple[Rows, SoftTargets | None]], weighers: list[Weigher]
) -> Learnt:
    """The step of one rank."""
    tokens = sum(int(rows.num_loss_tokens().sum()) for rows, _ in cut)
    losses, sums = [], []
    for batch in weighed_batches(cut, LAYOUTS, weighers, engine=objective, gather=lambda x: [x]):
        loss, unit_sums, _ = objective(batch, multiplier=1 / tokens)
        loss.backward()
        losses.append(loss.item())
        sums.append(unit_sums.numpy())
    layout, total = objective.loss_head.layout, sum(sums)
    named = {name: float(np.sum(total[layout.place(name)])) for name in layout.by_domain}
    parameters = objective.student.named_parameters()
    gradient = {name: p.grad for name, p in parameters if p.grad is not None}
    return Learnt(sum(losses), gradient, named)


@dataclass(frozen=True)
class Dense:
    """The whole step through `transformers` in float64."""

    student: torch.nn.Module
    log_p_NV: Tensor
    log_q_NV: Tensor
    label_N1: Tensor
    document_N: Tensor

    @staticmethod
    def of(pair: tiny.Pair) -> "Dense":
        batch = LAYOUTS.batch(unit(0, count=ROWS))
        found = []
        models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            for folder in (pair.teacher, pair.student)
        ]
        for model in models:
            positions = batch["position_ids_BT"]
            output = model(batch["input_ids_BT"], position_ids=positions, use_cache=False)
            logits_NV = output.logits.flatten(0, 1)[batch["loss_index_N"]]
            found.append(logits_NV.log_softmax(-1))
        label_N1 = batch["label_N"][:, None]
        return Dense(models[1], found[0].detach(), found[1], label_N1, batch["document_N"])

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        named = dict(self.student.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        return dict(zip(named, found, strict=True))


def check(found: Learnt, loss: Tensor, dense: Dense) -> None:
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = dense.gradient(loss)
    assert found.gradient.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found.gradient[name] - gradient).abs().max() < 1e-4 * scale, name


@every_cut
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("hard_fraction", [0.0, 0.3, 1.0])
def test_atkd_splits_the_whole_step_however_it_is_cut(
    tmp_path: Path,
    tiny_pair: tiny.Pair,
    teacher: HFEngine,
    cut: str,
    direction: str,
    hard_fraction: float,
) -> None:
    section = {"kind": "atkd", "direction": direction, "hard_fraction": hard_fraction}
    objective = objective_of(tmp_path, tiny_pair, [section])
    weighers = weighers_of(objective_losses(tmp_path, tiny_pair, [section]))
    found = learnt(objective, cut_of(cut, teacher), weighers)
    dense = Dense.of(tiny_pair)
    log_a_NV, log_b_NV = dense.log_p_NV, dense.log_q_NV
    if direction == "reverse":
        log_a_NV, log_b_NV = log_b_NV, log_a_NV
    a_N, b_N = (x.gather(1, dense.label_N1)[:, 0].exp() for x in (log_a_NV, log_b_NV))
    tkd_N = a_N * (a_N / b_N).log() + (1 - a_N) * ((1 - a_N) / (1 - b_N)).log()
    kl_N = (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
    dkd_N = (kl_N - tkd_N) / (1 - a_N)
    sizes = a_N.detach().sort(descending=True).values
    place = int((1 - hard_fraction) * (len(a_N) - 1) + 1e-9)
    hard_N = a_N.detach() <= sizes[place] if hard_fraction else torch.zeros_like(a_N).bool()
    loss = 0.2 * _mean(dkd_N[~hard_N]) + 0.8 * _mean((dkd_N + tkd_N)[hard_N])
    check(found, loss, dense)
    assert found.sums["hard_share"] == hard_N.sum()
    assert found.sums["uncertainty"] == pytest.approx((1 - a_N).sum().item(), rel=1e-5)
    assert found.sums["tkd"] == pytest.approx(tkd_N.sum().item(), rel=1e-4)
    assert found.sums["dkd"] == pytest.approx(dkd_N.sum().item(), rel=1e-4)


@every_cut
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("hardest", [0.3, 1.0])
def test_token_temperatures_are_those_of_the_whole_step_however_it_is_cut(
    tmp_path: Path,
    tiny_pair: tiny.Pair,
    teacher: HFEngine,
    cut: str,
    divergence: str,
    hardest: float,
) -> None:
    options = {"hardest": hardest, "strength": 0.8, "levels": 3}
    section = {"kind": "token_temperature", "divergence": divergence, **options}
    objective = objective_of(tmp_path, tiny_pair, [section])
    (term,) = objective_losses(tmp_path, tiny_pair, [section])
    found = learnt(
        objective, cut_of(cut, teacher, temperatures=(1.0, *term.temperatures)), weighers_of([term])
    )
    dense = Dense.of(tiny_pair)
    roots = [(log_NV / 2).exp() for log_NV in (dense.log_p_NV, dense.log_q_NV.detach())]
    distance_N = ((roots[0] - roots[1]).square().sum(-1) / 2).sqrt()
    learnt_N = (
        distance_N
        >= distance_N.sort(descending=True).values[math.ceil(hardest * len(distance_N)) - 1]
    )
    hardness_N = torch.tanh((distance_N / distance_N[learnt_N].median()).log())
    tau_N1 = torch.exp(-0.8 * hardness_N.round())[:, None]
    a_NV, b_NV = ((log / tau_N1).log_softmax(-1) for log in (dense.log_p_NV, dense.log_q_NV))
    if divergence == "reverse_kl":
        a_NV, b_NV = b_NV, a_NV
    kl_N = tau_N1[:, 0].square() * (a_NV.exp() * (a_NV - b_NV)).sum(-1)
    check(found, kl_N[learnt_N].mean(), dense)


def objective_losses(folder: Path, pair: tiny.Pair, losses: list[dict]) -> list:
    return plan_of(folder / "run", pair, prepared_domains(folder), losses=losses).config.losses


def _mean(value_N: Tensor) -> Tensor:
    return value_N.mean() if len(value_N) else value_N.sum()


class ByDocument:
    """A position counts its share of its document's entropy times how much surer the teacher is
    of the label than the student, less the step's mean of that."""

    looks: frozenset[Look] = frozenset({"entropy", "label_logprob"})

    def weigh(self, step: StepView) -> list[Columns]:
        mean = step.whole(self._surer).mean()
        return [{"weight_N": self._share(unit) * (self._surer(unit) - mean)} for unit in step.units]

    def _surer(self, unit: UnitView) -> np.ndarray:
        return unit.of_teacher("label_logprob") - unit.student["label_logprob"]

    def _share(self, unit: UnitView) -> np.ndarray:
        document_N = unit.layout.document_N
        sums = np.bincount(document_N, weights=unit.student["entropy"])
        return (unit.student["entropy"] / sums[document_N]).astype(np.float32)


@every_cut
def test_weights_of_the_whole_step_multiply_every_loss(
    tmp_path: Path, tiny_pair: tiny.Pair, teacher: HFEngine, cut: str
) -> None:
    losses = [{"kind": "cross_entropy", "weight": 0.5}, {"kind": "forward_kl"}]
    objective = objective_of(tmp_path, tiny_pair, losses)
    found = learnt(objective, cut_of(cut, teacher), [ByDocument()])
    dense = Dense.of(tiny_pair)
    teacher_N, student_N = (
        x.gather(1, dense.label_N1)[:, 0] for x in (dense.log_p_NV, dense.log_q_NV)
    )
    surer_N = (teacher_N - student_N).detach()
    entropy_N = -(dense.log_q_NV.exp() * dense.log_q_NV).sum(-1).detach()
    sums = torch.zeros(int(dense.document_N.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, dense.document_N, entropy_N)
    weight_N = entropy_N / sums[dense.document_N] * (surer_N - surer_N.mean())
    assert weight_N.min() < -0.01 < 0.01 < weight_N.max()
    kl_N = (dense.log_p_NV.exp() * (dense.log_p_NV - dense.log_q_NV)).sum(-1)
    check(found, (weight_N * (kl_N - 0.5 * student_N)).mean(), dense)


def test_a_look_at_the_student_leaves_it_as_it_is(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    objective = objective_of(tmp_path, tiny_pair, [{"kind": "cross_entropy"}])
    for training in (True, False):
        objective.train(training)
        state = torch.get_rng_state()
        found = looked(objective, LAYOUTS, [(unit(0, count=2), None)], {"label_logprob"})
        assert objective.training == training
        assert torch.equal(torch.get_rng_state(), state)
        assert list(found[0]) == ["label_logprob"]
    assert looked(None, LAYOUTS, [(unit(0, count=2), None)], set()) == [{}]
    assert all(p.grad is None for p in objective.parameters())
