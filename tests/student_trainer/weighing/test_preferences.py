"""Preferences: golden values, gradients in float64, a whole step whatever its cut, and a run.

P pairs of a step   N positions with loss   V vocabulary
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config.adaptive_losses import Preference
from shared.config.domains import Data, Domain
from shared.config.run import Config
from shared.data.prepared import PreparedDomain
from shared.data.row_store import RowStore
from shared.data.rows import Rows
from shared.data.tokenise import prepare_domain
from shared.errors import DataError
from shared.run.metrics import read_metrics
from student_trainer.objective import Objective
from student_trainer.tasks.causal_lm import CAUSAL_LM
from student_trainer.weighing.preferences import pair_losses
from student_trainer.weighing.weighed import weighers_of
from teacher_service.engine.hf import HFEngine
from tests import tiny
from tests.answers import question_of
from tests.student_trainer.comparing import same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import mark_exported, plan_of, prepared_domains
from tests.student_trainer.test_objective import CPU
from tests.student_trainer.weighing.test_weigher import LAYOUTS, Dense, check, learnt
from tests.teacher_service.scripted import make_rows
from tests.telling import telling

OBJECTIVES = ("dpo", "kto_pair")
LENGTHS = [[9, 12], [20, 6, 8, 8], [15, 15], [7, 30]]  # of responses and what stands before them
CUTS = {"whole": [0, 4], "uneven": [0, 1, 4], "rows": [0, 1, 2, 3, 4]}
GOOD, BAD = "the answer is four", "the answer is five"


def textbook(ratio_P2: Tensor, objective: str, beta: float, *, stopped: bool = True) -> Tensor:
    """The mean over pairs as the papers write it; `stopped` stops the gradient of the KLs."""
    chosen_P, rejected_P = ratio_P2.unbind(1)
    if objective == "dpo":
        return -torch.nn.functional.logsigmoid(beta * (chosen_P - rejected_P)).mean()
    kl_2 = ratio_P2.mean(0).clamp(min=0)
    kl_2 = kl_2.detach() if stopped else kl_2
    good_P = 1 - torch.sigmoid(beta * (chosen_P - kl_2[1]))
    bad_P = 1 - torch.sigmoid(beta * (kl_2[0] - rejected_P))
    return torch.cat([good_P, bad_P]).mean()


def ratios() -> Tensor:
    torch.manual_seed(0)
    return (4 * torch.randn(6, 2, dtype=torch.float64) + 1).requires_grad_()


@pytest.mark.parametrize(("objective", "expected"), [("dpo", np.log(2)), ("kto_pair", 0.5)])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_a_student_that_is_its_teacher_has_the_loss_of_a_coin(objective, expected, beta) -> None:
    asked = {"kl_2": np.zeros(2), "objective": objective, "beta": beta}
    loss_P, slope_P2 = pair_losses(np.zeros((3, 2)), **asked)
    np.testing.assert_allclose(loss_P, expected)
    assert (slope_P2[:, 0] < 0).all()
    np.testing.assert_allclose(slope_P2[:, 1], -slope_P2[:, 0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_slopes_are_those_of_autograd_in_float64(objective: str) -> None:
    ratio_P2 = ratios()
    kl_2 = ratio_P2.mean(0).clamp(min=0).detach().numpy()
    asked = {"kl_2": kl_2, "objective": objective, "beta": 0.3}
    loss_P, slope_P2 = pair_losses(ratio_P2.detach().numpy(), **asked)
    loss = textbook(ratio_P2, objective, 0.3)
    (expected_P2,) = torch.autograd.grad(loss, ratio_P2)
    np.testing.assert_allclose(loss_P.mean(), loss.item(), rtol=1e-12)
    np.testing.assert_allclose(slope_P2 / 6, expected_P2, rtol=1e-10)


def test_the_gradient_of_the_kls_is_stopped() -> None:
    ratio_P2 = ratios()
    kl_2 = ratio_P2.mean(0).clamp(min=0).detach().numpy()
    asked = {"kl_2": kl_2, "objective": "kto_pair", "beta": 0.3}
    _, slope_P2 = pair_losses(ratio_P2.detach().numpy(), **asked)
    stopped, through = (
        torch.autograd.grad(textbook(ratio_P2, "kto_pair", 0.3, stopped=is_stopped), ratio_P2)[0]
        for is_stopped in (True, False)
    )
    np.testing.assert_allclose(slope_P2 / 6, stopped, rtol=1e-10)
    assert np.abs(slope_P2 / 6 - through.numpy()).max() > 1e-2 * stopped.abs().max()


def test_far_ratios_stay_finite() -> None:
    for objective in OBJECTIVES:
        asked = {"kl_2": np.zeros(2), "objective": objective, "beta": 1.0}
        for found in pair_losses(np.array([[-1e5, 1e5], [1e5, -1e5]]), **asked):
            assert np.isfinite(found).all()


def pairs_of_responses() -> Rows:
    """Rows of one or two pairs, in each document the first third is a prompt."""
    rows = make_rows(LENGTHS, vocab=tiny.VOCAB)
    masks = [mask.copy() for mask in rows.column("loss_mask")]
    for mask, lengths in zip(masks, LENGTHS, strict=True):
        for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
            mask[start : start + length // 3] = 0
    return Rows.build(
        domains=["code"] * len(LENGTHS),
        indices=range(len(LENGTHS)),
        input_ids=rows.column("input_ids"),
        doc_starts=rows.column("doc_starts"),
        loss_masks=masks,
    )


@pytest.fixture(scope="module")
def teacher(tiny_pair: tiny.Pair) -> HFEngine:
    return HFEngine.load(str(tiny_pair.teacher))


def config_of(folder: Path, pair: tiny.Pair, **section: object) -> Config:
    losses = [{"kind": "preference", **section}]
    asked = {"losses": losses, "data": {"too_long": "drop"}}
    return plan_of(folder / "run", pair, prepared_domains(folder), **asked).config


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_that_of_the_dense_models_however_it_is_cut(
    tmp_path: Path, tiny_pair: tiny.Pair, teacher: HFEngine, cut: str, objective: str
) -> None:
    config = config_of(tmp_path, tiny_pair, objective=objective, beta=0.5)
    student = Objective(CAUSAL_LM.load(config, device=CPU), config, teacher_width=None)
    rows = pairs_of_responses()
    spec = question_of(top_k=8, shared_vocab=tiny.VOCAB, temperatures=(1.0,), encoding="fp32")
    units = [rows.part(slice(*edges)) for edges in pairwise(CUTS[cut])]
    found = learnt(
        student, [(one, teacher.score(one, spec)) for one in units], weighers_of(config.losses)
    )
    dense = dense_of(tiny_pair, rows)
    ratio_N = (dense.log_q_NV - dense.log_p_NV).gather(1, dense.label_N1)[:, 0]
    sums = torch.zeros(10, dtype=torch.float64).index_add(0, dense.document_N, ratio_N)
    check(found, textbook(sums.reshape(-1, 2), objective, 0.5), dense)


def dense_of(pair: tiny.Pair, rows: Rows) -> Dense:
    """Every document by itself through transformers, in float64."""
    layout, found = LAYOUTS.batch(rows), []
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (pair.teacher, pair.student)
    ]
    for model in models:
        logits: list[Tensor] = []
        columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
        for ids, starts, mask in zip(*columns, strict=True):
            for first, last in pairwise([*starts.tolist(), len(ids)]):
                ids_1T = torch.from_numpy(ids[first:last].astype(np.int64))[None]
                logits.append(model(ids_1T, use_cache=False).logits[0][mask[first:last] == 1])
        found.append(torch.cat(logits).log_softmax(-1))
    label_N1 = layout["label_N"][:, None]
    return Dense(models[1], found[0].detach(), found[1], label_N1, layout["document_N"])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(folder: Path, pair: tiny.Pair, rows: list[dict], **asked: object) -> PreparedDomain:
    """Rows of preferences on disk."""
    path = write_rows(folder / "pairs.jsonl", rows)
    domain = Domain.model_validate({"train": str(path), **asked})
    return prepare_domain(
        "pairs",
        domain,
        data=Data(context=64, too_long="drop"),
        root=folder,
        cache=folder / "cache",
        tokenizer=lambda: AutoTokenizer.from_pretrained(pair.student),
        tokenizer_digest="tiny",
        pairs=True,
        progress=False,
    )


def asked_rows(count: int) -> list[dict]:
    return [{"prompt": f"q {n}", "chosen": f"{GOOD} {n}", "rejected": BAD} for n in range(count)]


def test_a_pair_is_two_documents_that_are_never_apart(tmp_path: Path, tiny_pair) -> None:
    rows = [*asked_rows(30), {"prompt": "q", "chosen": "x " * 60, "rejected": BAD}]
    found = RowStore.open(prepared(tmp_path, tiny_pair, rows).train_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.student)
    texts = []
    for ids, starts in zip(
        *(found.take(range(len(found))).column(name) for name in ("input_ids", "doc_starts")),
        strict=True,
    ):
        assert len(starts) % 2 == 0
        parts = np.split(ids, starts[1:])
        texts += [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
    assert len(texts) < 2 * 31
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        number = chosen.split()[-1]
        assert (chosen, rejected) == (f"q {number}\n{GOOD} {number}", f"q {number}\n{BAD}")


def test_columns_name_the_responses(tmp_path: Path, tiny_pair) -> None:
    rows = [{"question": f"q {n}", "good": f"{GOOD} {n}", "bad": BAD} for n in range(4)]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert prepared(tmp_path, tiny_pair, rows, columns=columns).num_rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": GOOD}, "pairs.jsonl:2 has no rejected, and a preference loss"),
        ({"prompt": "q", "rejected": BAD}, "pairs.jsonl:2 has no chosen, and a preference loss"),
        ({"chosen": GOOD, "rejected": BAD}, "pairs.jsonl:2 has no prompt"),
        ({"text": "plain"}, "has no prompt and no chosen and no rejected"),
        ({"prompt": "q", "chosen": BAD, "rejected": BAD}, "are the same, so neither is preferred"),
        ({"prompt": "q", "chosen": 1, "rejected": 2}, "response is int 1, not a string"),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path: Path, tiny_pair, row, said) -> None:
    with pytest.raises(DataError, match=said):
        prepared(tmp_path, tiny_pair, [*asked_rows(1), row])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"losses": [{"kind": "preference"}, {"kind": "forward_kl"}]}, "a forward_kl too"),
        ({"data": {"too_long": "split"}}, "too_long is split, and a pair is never cut"),
        ({"data": {"loss_on": "everything", "too_long": "drop"}}, "prompts are not preferred"),
        ({"weighting": {"policy": "llkd"}}, "weighs tokens one by one"),
        ({"source": "student"}, "what models write is no pair"),
        ({"mixture": {"policy": "ddk"}}, "which are over both responses; take a fixed mixture"),
        ({"baseline": True}, "would train another student on both; set baseline=false"),
    ],
)
def test_what_would_learn_rejected_responses_is_refused(tmp_path, tiny_pair, asked, said) -> None:
    plain = {"losses": [{"kind": "preference"}], "data": {"too_long": "drop"}}
    with pytest.raises(ValueError, match=said):
        plan_of(tmp_path / "run", tiny_pair, prepared_domains(tmp_path), **{**plain, **asked})


@pytest.mark.parametrize("objective", telling(OBJECTIVES, "kto_pair"))
def test_a_run_learns_what_is_chosen_and_resumes_bit_for_bit(
    tmp_path: Path, tiny_pair: tiny.Pair, objective: str
) -> None:
    domain = replace(prepared(tmp_path, tiny_pair, asked_rows(80)), natural_weight=1.0)
    losses = [{"kind": "preference", "objective": objective, "beta": 0.5}]
    asked = {"losses": losses, "data": {"too_long": "drop"}, "log_every": 1}
    plan = plan_of(tmp_path / objective, tiny_pair, (domain,), **asked)
    run_jobs([as_job("resumed", plan, at=2)], tmp_path / "jobs")
    straight, resumed = tmp_path / objective, tmp_path / f"{objective}-resumed"
    assert same_weights(straight, resumed)
    first, *_, last = [m.terms["preference"] for m in read_metrics(straight / "metrics.jsonl")]
    assert last < first
    assert Preference().beta == 0.1


def test_two_ranks_learn_what_one_does(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    """The estimate of a KL that responses stand against is of the pairs of all ranks."""
    domain = replace(prepared(tmp_path, tiny_pair, asked_rows(40)), natural_weight=1.0)
    losses = [{"kind": "preference", "objective": "kto_pair", "beta": 0.5}]
    asked = {"losses": losses, "data": {"too_long": "drop"}, "log_every": 1, "steps": 3}
    alone = {"batch": {"rows_per_step": 8, "micro_batch": 8}, "student": {"workers": 1}}
    for ranks, options in ((2, {}), (1, alone)):
        plan = plan_of(tmp_path / f"on-{ranks}", tiny_pair, (domain,), **asked, **options)
        mark_exported(plan)
        run_jobs([as_job("train", plan)], tmp_path / f"jobs-{ranks}", ranks=ranks)
    both, one = (read_metrics(tmp_path / f"on-{ranks}" / "metrics.jsonl") for ranks in (2, 1))
    for line, expected in zip(both, one, strict=True):
        assert line.terms["preference"] == pytest.approx(expected.terms["preference"], rel=1e-5)
        assert line.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
