"""The objective in one process: where gradients go, and what is never allocated.

B lines   T tokens   N positions with loss   V vocabulary
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shared.config.losses import LossSection
from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.auxiliary.auxiliary import OutputNeeds
from student_trainer.losses.registry import AUXILIARIES
from student_trainer.objective import Objective
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import Given, encoded, question_of
from tests.student_trainer.runs import DOMAINS, plan_of, prepared_domains, ragged_rows

CPU = torch.device("cpu")
TEXT_ALONE = [{"kind": "cross_entropy"}]


def unit(seed: int, *, count: int) -> Rows:
    """Ragged rows with prompts, of both domains in turn."""
    rows = ragged_rows(seed, count=count)
    return Rows.build(
        domains=[DOMAINS[i % 2] for i in range(count)],
        indices=range(count),
        input_ids=rows.input_ids,
        doc_starts=rows.doc_starts,
        loss_masks=rows.loss_masks,
    )


@pytest.fixture
def objective(tmp_path: Path, tiny_pair: tiny.Pair) -> Objective:
    """Forward KL and cross-entropy on the tiny student, without an engine."""
    config = plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path)).config
    return Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)


@pytest.fixture(scope="module")
def answer(tiny_pair: tiny.Pair) -> SoftTargets:
    """The teacher's answer to unit 0."""
    spec = question_of(top_k=16, shared_vocab=tiny.VOCAB, encoding="fp32")
    return HFEngine.load(str(tiny_pair.teacher)).score(unit(0, count=4), spec)


def test_the_loss_equals_a_dense_one(
    objective: Objective, answer: SoftTargets, tiny_pair: tiny.Pair
) -> None:
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(unit(0, count=4), answer)
    loss, sums, weighted_N = objective(batch)
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float64)
    logits = model(
        input_ids=batch["input_ids_BT"], position_ids=batch["position_ids_BT"], use_cache=False
    ).logits
    log_q_NV = logits.flatten(0, 1)[batch["loss_index_N"]].log_softmax(-1)
    nll_N = -log_q_NV.gather(1, batch["label_N"][:, None])[:, 0]
    log_p_NK, log_q_NK = batch["logprobs_NK"].double(), log_q_NV.gather(1, batch["ids_NK"])
    tail_p_N, tail_q_N = 1 - log_p_NK.exp().sum(-1), 1 - log_q_NK.exp().sum(-1)
    kl_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1) + tail_p_N * (tail_p_N / tail_q_N).log()
    torch.testing.assert_close(weighted_N.double(), kl_N + 0.5 * nll_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), (kl_N + 0.5 * nll_N).sum(), rtol=1e-5, atol=0)
    expected = [kl_N + 0.5 * nll_N, 1 - tail_p_N, tail_q_N, kl_N, nll_N]
    layout = objective.loss_head.layout
    torch.testing.assert_close(
        sums[:5], torch.stack([v.sum() for v in expected]), rtol=1e-5, atol=0
    )
    assert layout.totals[3:] == ("losses.forward_kl", "losses.cross_entropy")
    code_N = batch["domain_N"] == 0
    by_domain = torch.stack([kl_N[code_N].sum(), kl_N[~code_N].sum()])
    torch.testing.assert_close(sums[layout.place("kl")], by_domain, rtol=1e-5, atol=0)
    excess_N = (nll_N + batch["label_logprob_N"]).clamp(min=0)
    by_domain = torch.stack([excess_N[code_N].sum(), excess_N[~code_N].sum()])
    torch.testing.assert_close(sums[layout.place("excess")], by_domain, rtol=1e-4, atol=0)
    assert len(sums) == layout.size == 9


def test_a_phase_sets_the_weight_of_the_hidden_states_and_of_nothing_else(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    """Gradients are linear in the weight: 1, 0.5 and 0 in three phases."""
    hidden = {"kind": "hidden_states", "layers": {1: 1}, "weight": 1.0, "final_weight": 0.0}
    config = plan_of(
        tmp_path / "run",
        tiny_pair,
        prepared_domains(tmp_path),
        steps=100,
        losses=[{"kind": "forward_kl"}, hidden],
        progressive={"phases": 3},
    ).config
    objective = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=48)
    spec = question_of(top_k=16, shared_vocab=tiny.VOCAB, encoding="fp32", hidden_layers=(1,))
    answer = HFEngine.load(str(tiny_pair.teacher)).score(unit(0, count=4), spec)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(unit(0, count=4), answer)
    found = []
    for phase in range(3):
        objective.zero_grad(set_to_none=True)
        loss, sums, weighted_N = objective(batch, phase=phase)
        loss.backward()
        gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
        assert weighted_N.sum() == pytest.approx(loss.item(), rel=1e-5)
        found.append(
            (
                loss.item(),
                torch.tensor(list(objective.loss_head.layout.losses_in(sums.numpy()).values())),
                torch.cat([g.flatten() for g in gradients]),
            )
        )
    losses, terms, gradients = zip(*found, strict=True)
    kl, distance = terms[0].tolist()
    assert losses == pytest.approx([kl + distance, kl + 0.5 * distance, kl], rel=1e-5)
    for other in terms[1:]:
        torch.testing.assert_close(other, terms[0])
    torch.testing.assert_close(gradients[1], (gradients[0] + gradients[2]) / 2)
    assert not torch.allclose(gradients[0], gradients[2])


class DriftSection(LossSection):
    """How far the last states are from those of the embedding."""

    asks_teacher: ClassVar[bool] = False

    kind: Literal["drift"] = "drift"
    weight: float = 0.25


class Drift:
    """Its loss, which two outputs of the decoder alone tell."""

    needs = OutputNeeds(("output_hidden_states",))

    def __init__(self, section: DriftSection, modules: torch.nn.ModuleDict) -> None:
        self.weight = section.weight

    def pick(self, output: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        drift = output.last_hidden_state - output.hidden_states[0]
        return {"drift_ND": drift.flatten(0, 1)[batch["loss_index_N"]]}

    def values(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return batch["drift_ND"].square().mean(-1)


def test_a_further_auxiliary_is_one_class_and_one_entry(
    tmp_path: Path, tiny_pair: tiny.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AUXILIARIES, "drift", Drift)
    plan = plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path), losses=TEXT_ALONE)
    config = plan.config.model_copy(update={"losses": [DriftSection(), *plan.config.losses]})
    objective = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(unit(0, count=4))
    loss, sums, weighted_N = objective(batch, multiplier=0.5)
    found = objective.loss_head.layout.losses_in(sums.numpy())
    assert list(found) == ["drift", "cross_entropy"]
    assert found["drift"] > 0
    torch.testing.assert_close(loss.double() * 2, weighted_N.double().sum())
    assert loss.item() * 2 == pytest.approx(0.25 * found["drift"] + found["cross_entropy"])


def test_positions_without_loss_get_exactly_no_gradient(
    objective: Objective, answer: SoftTargets
) -> None:
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(unit(0, count=4), answer)
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _arguments: tuple, output: object) -> None:
        hidden = output.last_hidden_state  # type: ignore[attr-defined]
        hidden.retain_grad()
        kept.append(hidden)

    objective._student[0].decoder.register_forward_hook(keep)
    objective(batch)[0].backward()
    gradient = kept[0].grad
    assert gradient is not None
    flat = gradient.flatten(0, 1).abs().sum(-1)
    with_loss = torch.zeros(len(flat), dtype=torch.bool)
    with_loss[batch["loss_index_N"]] = True
    assert (flat[~with_loss] == 0).all()
    assert (flat[with_loss] > 0).all()


def test_packed_documents_cost_the_same_as_separate_ones(
    objective: Objective, answer: SoftTargets
) -> None:
    rows = unit(0, count=4)
    losses = [
        objective(Layouts(DOMAINS, packed, CPU, CAUSAL_LM).batch(rows, answer))[2]
        for packed in (True, False)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_a_unit_without_loss_has_a_zero_loss_with_zero_gradients(objective: Objective) -> None:
    rows = ragged_rows(1, count=2)
    empty = Rows.build(
        domains=DOMAINS,
        indices=(0, 1),
        input_ids=rows.input_ids,
        doc_starts=rows.doc_starts,
        loss_masks=[np.zeros_like(mask) for mask in rows.loss_masks],
    )
    spec = question_of(top_k=16, shared_vocab=tiny.VOCAB, encoding="fp32")
    targets = _no_targets(spec, empty)
    loss, sums, _ = objective(Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(empty, targets))
    loss.backward()
    assert loss.item() == 0
    assert (sums == 0).all()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def _no_targets(spec: Question, rows: Rows) -> SoftTargets:
    nothing = np.zeros((0, spec.ask.num_ids), np.float32)
    arrays = Given(
        nothing.astype(np.int64), nothing, np.zeros((0, 1), np.float32), np.zeros(0, np.float32), {}
    )
    return SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=rows.hashes(),
        num_targets_R=np.zeros(len(rows), np.int64),
        columns=encoded(spec, arrays),
    )


class Largest(TorchDispatchMode):
    """Remembers the most elements any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_is_as_large_as_all_logits(tmp_path: Path) -> None:
    vocabulary, context, lines = 32_768, 256, 4
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "wide")
    pair = tiny.Pair(tmp_path / "wide", tmp_path / "wide")
    config = plan_of(
        tmp_path / "run",
        pair,
        prepared_domains(tmp_path),
        losses=[{"kind": "cross_entropy"}],
        data={"context": context},
    ).config
    ids = np.arange(lines * context).reshape(lines, context)
    mask = np.ones(context, np.uint8)
    mask[-1] = 0
    rows = Rows.build(
        domains=["code"] * lines,
        indices=range(lines),
        input_ids=list(ids),
        doc_starts=[np.zeros(1)] * lines,
        loss_masks=[mask] * lines,
    )
    objective = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)
    batch = Layouts(DOMAINS, True, CPU, CAUSAL_LM).batch(rows)
    with Largest() as seen:
        loss, _, _ = objective(batch)
        loss.backward()
        with torch.no_grad():
            objective(batch, mode="evaluate")
    assert vocabulary * 16 <= seen.elements <= lines * context * vocabulary // 2
