"""What arrives through the service is what a dense float32 loss in one process computes.

N positions with loss, all rows end to end   D student width   V vocabulary
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.config.losses import ForwardKL
from shared.config.models.teachers import Teacher
from shared.data.layout import lay_out
from shared.data.rows import Rows
from shared.targets.asks.head_location import find_head
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.kernel.primitive import Head
from student_trainer.losses.kernel.targets import Targets, TeacherTargets
from student_trainer.losses.kernel.teacher_states import TeacherHead, TeacherStates
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import TokenLosses, token_losses
from teacher_service.engine.hf import HFEngine
from teacher_service.service import service
from teacher_service.service.pool import open_pool
from tests.answers import decoded, question_of
from tests.telling import telling

SERVICE = "remote-equals-dense"
LENGTHS = ((60, 41), (90,), (17, 30, 25))  # documents of each row


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Where the service keeps its head."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=telling(["tiny", "real"], "tiny"))
def models(request, ray_cluster, cache) -> Iterator[tuple[Path, Path, int]]:
    """Teacher, student and vocabulary; the teacher serves under SERVICE meanwhile."""
    if request.param == "tiny":
        pair = request.getfixturevalue("tiny_pair")
        teacher, student, vocab = pair.teacher, pair.student, 512
    else:
        folder = request.getfixturevalue("reference") / "models"
        teacher, student, vocab = folder / "teacher-6m", folder / "student-base-1m", 4096
    served = Teacher(model=str(teacher), cpus=0.5)
    service.start(SERVICE, served, detached=False, cache=str(cache)).described()
    yield teacher, student, vocab
    service.stop(SERVICE)


def rows_of(vocab: int) -> Rows:
    """Packed rows of random tokens; the first third of every document is prompt."""
    rng = np.random.default_rng(0)
    masks = [[np.r_[np.zeros(n // 3), np.ones(n - 1 - n // 3), 0] for n in row] for row in LENGTHS]
    return Rows.build(
        domains=["any"] * len(LENGTHS),
        indices=range(len(LENGTHS)),
        input_ids=[rng.integers(3, vocab, sum(row)) for row in LENGTHS],
        doc_starts=[np.cumsum([0, *row[:-1]]) for row in LENGTHS],
        loss_masks=[np.concatenate(row) for row in masks],
    )


def answered(rows: Rows, spec: Question) -> SoftTargets:
    """The running service's answer, over Ray and Arrow."""
    pool = open_pool(0, service=SERVICE)
    pool.submit(rows, spec)
    answer = pool.next()
    answer.check(rows, spec)
    return answer


def student_loss(
    folder: Path, rows: Rows, answer: SoftTargets, *, cache: Path | None = None
) -> tuple[TokenLosses, list]:
    """The trainer's chunked loss on the packed batch, and its gradients to hidden and head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = lay_out(rows, packed=True)
    with torch.no_grad():
        hidden = model.get_decoder()(
            input_ids=torch.from_numpy(layout.input_ids_BT),
            position_ids=torch.from_numpy(layout.position_ids_BT),
            use_cache=False,
        ).last_hidden_state
    hidden_ND = hidden.flatten(0, 1)[torch.from_numpy(layout.loss_index_N)].requires_grad_()
    weight_VD = model.get_output_embeddings().weight.detach().requires_grad_()
    found = token_losses(
        hidden_ND,
        Head(weight_VD),
        label_N=torch.from_numpy(layout.label_N),
        terms=terms_of([ForwardKL()]),
        targets=targets_of(answer, cache),
    )
    found.loss.backward()
    return found, [hidden_ND.grad, weight_VD.grad]


def targets_of(answer: SoftTargets, cache: Path | None) -> Targets:
    """An answer as the trainer's losses take it."""
    arrays = decoded(answer)
    if arrays.last_ND is not None:
        assert cache is not None
        loaded = load_file(find_head(cache, answer.question.ask.head))
        head = TeacherHead(Head(loaded["weight"]), answer.question.ask.shared_vocab)
        return TeacherStates(torch.from_numpy(arrays.last_ND.copy()), head)
    return TeacherTargets(
        torch.from_numpy(arrays.ids_NK.copy()),
        torch.from_numpy(arrays.logprobs_NK.copy()),
        torch.from_numpy(arrays.log_tail_NS.copy()),
        answer.question.ask.temperatures,
    )


def dense_log_probs(folder: Path, rows: Rows) -> torch.Tensor:
    """Log-probabilities [N, V] with every document alone, as plain transformers gives them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = lay_out(rows, packed=False)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(layout.input_ids_BT), use_cache=False
        ).logits.flatten(0, 1)
    return logits[torch.from_numpy(layout.loss_index_N)].log_softmax(-1)


def test_remote_and_in_process_teachers_give_equal_losses(models) -> None:
    teacher, student, vocab = models
    rows = rows_of(vocab)
    spec = question_of(top_k=vocab, shared_vocab=vocab, encoding="fp32")
    found, _ = student_loss(student, rows, answered(rows, spec))
    log_p_NV, log_q_NV = dense_log_probs(teacher, rows), dense_log_probs(student, rows)
    dense_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    assert dense_N.min() > 0.01
    torch.testing.assert_close(found.terms["forward_kl"], dense_N, rtol=0, atol=1e-4)


def test_states_and_a_head_through_the_service_give_the_dense_loss_and_gradient(
    models, cache
) -> None:
    """The service keeps its head in its cache; nothing is rounded on the way."""
    teacher, student, vocab = models
    rows, head = rows_of(vocab), service.ship_head(SERVICE)
    spec = question_of(
        0, vocab, head=head.digest, states=head.states, states_width=head.states_width
    )
    found, slopes = student_loss(student, rows, answered(rows, spec), cache=cache)
    full = question_of(top_k=vocab, shared_vocab=vocab, encoding="fp32")
    other, expected = student_loss(student, rows, answered(rows, full))
    torch.testing.assert_close(
        found.terms["forward_kl"], other.terms["forward_kl"], rtol=0, atol=1e-5
    )
    for one, another in zip(slopes, expected, strict=True):
        assert float((one - another).norm() / another.norm()) < 1e-5
    log_p_NV, log_q_NV = dense_log_probs(teacher, rows), dense_log_probs(student, rows)
    dense_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    torch.testing.assert_close(found.terms["forward_kl"], dense_N, rtol=0, atol=1e-4)


# Relative error of the gradient, and nats of a position's loss.
COSTS = {"fp16": (1e-3, 1e-3), "int8": (1e-2, 1e-2)}


def test_small_encodings_cost_a_thousandth_or_a_hundredth_of_the_gradient(models, capsys) -> None:
    _, student, vocab = models
    rows = rows_of(vocab)
    gradients, values = {}, {}
    for encoding in ("fp32", *COSTS):
        spec = question_of(top_k=64, shared_vocab=vocab, encoding=encoding)
        found, gradients[encoding] = student_loss(student, rows, answered(rows, spec))
        values[encoding] = found.terms["forward_kl"]
    for encoding, (gradient_bound, loss_bound) in COSTS.items():
        pairs = zip(gradients[encoding], gradients["fp32"], strict=True)
        errors = [float((small - exact).norm() / exact.norm()) for small, exact in pairs]
        off = float((values[encoding] - values["fp32"]).abs().max())
        with capsys.disabled():
            print(f"\n{encoding}: relative gradient error {errors[0]:.1e} (hidden), "
                  f"{errors[1]:.1e} (head); largest loss error {off:.1e} nats")  # fmt: skip
        assert max(errors) <= gradient_bound, encoding
        assert off <= loss_bound, encoding


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_drawn_ids_are_those_that_this_process_would_draw(models, selector) -> None:
    teacher, _, vocab = models
    rows = rows_of(vocab).with_draws(np.array([0, 1, 2]))
    spec = question_of(32, vocab, encoding="fp32", selector=selector, entropy=True)
    remote, again = answered(rows, spec), answered(rows, spec)
    assert remote.table.equals(again.table)
    one, other = decoded(remote), decoded(HFEngine.load(str(teacher)).score(rows, spec))
    # Logits of other threads differ in their last bits, and hardly a draw with them.
    same_N = (one.ids_NK == other.ids_NK).all(1)
    assert same_N.mean() > 0.98
    difference_NK = np.exp(one.logprobs_NK) - np.exp(other.logprobs_NK)
    assert np.abs(difference_NK[same_N]).max() < 1e-5
    assert one.entropy_N is not None
    np.testing.assert_allclose(one.entropy_N, other.entropy_N, atol=1e-4)
