"""Losses across tokenizers: equal to the plain ones where there is one tokenizer, else to a dense
computation.

N positions with loss   V vocabulary
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.data.rows import Rows
from student_trainer.losses.across.reading import compared
from student_trainer.sources.batches import Layouts
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.losses.across.subjects import CPU, FEW, Across, across, tokenizer
from tests.student_trainer.runs import DOMAINS
from tests.telling import telling

KINDS = [
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "jsd", "beta": 0.3},
    {"kind": "skew_reverse_kl"},
    {"kind": "total_variation"},
    {"kind": "akl"},
    {"kind": "alpha_beta"},
    {"kind": "generalised_kl"},
]


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> Across:
    """Teacher and student with one tokenizer."""
    return across(tmp_path_factory.mktemp("same"), teacher_vocab=tiny.VOCAB)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Across:
    """A teacher with fewer and shorter tokens."""
    return across(tmp_path_factory.mktemp("other"), teacher_vocab=FEW)


def exact(batch: dict) -> dict:
    """A batch in float64."""
    return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}


def learnt(objective: Any, batch: dict) -> tuple[torch.Tensor, ...]:
    """Loss, sums and gradients of a batch."""
    objective.zero_grad()
    loss, sums, weighted_N = objective(batch, multiplier=0.1)
    loss.backward()
    grads = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    return (loss.detach(), sums, weighted_N, *grads)


@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: "-".join(map(str, loss.values())))
@pytest.mark.parametrize("top_k", [16, tiny.VOCAB])
@pytest.mark.parametrize("method", ["aligned", "grouped"])
def test_with_one_tokenizer_it_is_the_plain_loss_to_the_bit(
    same: Across, loss: dict, top_k: int, method: str
) -> None:
    if method == "grouped" and loss.get("temperature", 1.0) != 1:
        pytest.skip("groups are compared at temperature 1")
    assert same.teacher_rows.table.equals(same.student_rows.table)
    temperatures = tuple(sorted({1.0, loss.get("temperature", 1.0)}))
    answer = same.answer(top_k, temperatures)
    options = {"losses": [loss, {"kind": "cross_entropy", "weight": 0.5}]}
    options["targets"] = {"top_k": top_k}
    plain = same.objective(**options)
    aligned = same.objective(**options, cross_tokenizer=method)
    layouts = Layouts(DOMAINS, True, CPU, CAUSAL_LM)
    loss, sums, *found = learnt(aligned, same.batch(answer))
    expected, their_sums, *others = learnt(plain, layouts.batch(same.student_rows, answer.targets))
    assert loss == expected != 0
    for one, two in zip(found, others, strict=True):
        assert torch.equal(one, two)
    own, theirs = (objective.loss_head.layout for objective in (aligned, plain))
    for name in theirs.names:
        assert torch.equal(sums[own.place(name)], their_sums[theirs.place(name)]), name
    assert sums[own.place("compared_share")].sum() == same.student_rows.num_loss_tokens().sum()


@pytest.mark.parametrize("top_k", [8, FEW])
@pytest.mark.parametrize("temperature", telling([1.0, 2.0], 2.0))
@pytest.mark.parametrize(
    "kind", telling(["forward_kl", "reverse_kl", "total_variation"], "forward_kl", "reverse_kl")
)
def test_values_and_gradients_are_those_of_a_dense_computation(
    other: Across, kind: str, top_k: int, temperature: float
) -> None:
    answer = other.answer(top_k, tuple(sorted({1.0, temperature})))
    losses = [{"kind": kind, "temperature": temperature}]
    objective = other.objective(losses=losses, cross_tokenizer="aligned")
    objective.double()
    loss, _, _ = objective(exact(other.batch(answer)))
    loss.backward()
    model = student_of(other)
    expected = dense_aligned(other, answer, model, kind, temperature)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_same_gradients(objective, model)


@pytest.mark.parametrize("top_k", [8, FEW])
def test_uld_is_the_sum_of_differences_of_sorted_probabilities(other: Across, top_k: int) -> None:
    answer = other.answer(top_k)
    losses = [{"kind": "total_variation", "weight": 2.0}]
    objective = other.objective(losses=losses, cross_tokenizer="uld")
    objective.double()
    loss, _, _ = objective(exact(other.batch(answer)))
    loss.backward()
    model = student_of(other)
    expected = dense_by_rank(other, answer, model, top_k)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert_same_gradients(objective, model)


@pytest.mark.parametrize("method", ["aligned", "uld"])
def test_what_is_compared_is_counted_and_what_is_not(other: Across, method: str) -> None:
    """Of a document that the teacher does not read alike nothing is, and by rank only where both
    begin a token."""
    other = replace(other, teacher_rows=without_first_document(other.teacher_rows))
    answer = other.answer(8)
    losses = [{"kind": "total_variation", "weight": 2.0}]
    objective = other.objective(losses=losses, cross_tokenizer=method)
    _, sums, _ = objective(other.batch(answer))
    found = [
        len(students) if method == "aligned" else 1
        for _, _, spans, _ in begun(other, answer, student_of(other))
        for students, _ in spans
    ]
    counted = sums[objective.loss_head.layout.place("compared_share")].sum()
    assert counted == sum(found)
    assert 0 < counted < other.student_rows.num_loss_tokens().sum()


def test_a_position_whose_outcomes_the_student_lacks_is_compared_in_its_span_alone() -> None:
    batch = {
        "compared_N": torch.tensor([True, True, True, False]),
        "absent_NK": torch.tensor([[False, True], [True, True], [True, True], [True, True]]),
        "span_share_N": torch.tensor([0.0, 0.0, 0.5, 0.5]),
    }
    assert compared(batch)["compared_share"].tolist() == [True, False, True, True]
    by_rank = batch | {"ranked_NK": torch.zeros(4, 2)}
    assert compared(by_rank)["compared_share"].tolist() == [True, True, True, False]
    assert compared({}) == {}


def without_first_document(rows: Rows) -> Rows:
    """The rows without a position with loss in their first document."""
    masks = [mask.copy() for mask in rows.column("loss_mask")]
    masks[0][: rows.column("doc_starts")[0][1]] = 0
    return Rows.build(
        domains=rows.domains(),
        indices=range(len(rows)),
        input_ids=rows.column("input_ids"),
        doc_starts=rows.column("doc_starts"),
        loss_masks=masks,
    )


def test_the_teachers_nats_of_a_text_are_those_of_its_own_tokens(other: Across) -> None:
    answer = other.answer(8)
    found = other.batch(answer)["label_logprob_N"].double().sum()
    expected = answer.targets.arrays().label_logprob_N.astype(np.float64).sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_evaluation_has_the_divergence_of_both_models_next_tokens_and_spans(other: Across) -> None:
    answer = other.answer(FEW)
    objective = other.objective(cross_tokenizer="uld", losses=[{"kind": "cross_entropy"}])
    objective.double()
    with torch.no_grad():
        (sums,) = objective(exact(other.batch(answer)), mode="evaluate")
    expected = dense_aligned(other, answer, student_of(other), "forward_kl").detach()
    assert float(sums[1].sum()) == pytest.approx(float(expected), rel=1e-6)


# A dense computation of its own: by the bytes of decoded prefixes, position by position.


def assert_same_gradients(objective: Any, model: Any) -> None:
    own = dict(objective.student.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)


def student_of(case: Across) -> Any:
    return AutoModelForCausalLM.from_pretrained(case.folder / "pair" / "student").double()


def dense_aligned(
    case: Across, answer: Any, model: Any, kind: str, temperature: float = 1.0
) -> torch.Tensor:
    """The sum of a divergence over next tokens, times the square of the temperature, and spans of
    all documents."""
    own, others = tokenizer(tiny.VOCAB), tokenizer(case.teacher_vocab)
    total = torch.zeros((), dtype=torch.double)
    same = {i: own.convert_tokens_to_ids(t) for t, i in others.get_vocab().items()}
    known = set(own.get_vocab().values())
    for logprob, labels, begins, kept in begun(case, answer, model):
        for span in begins:
            students, teachers = span
            at, where = students[0], teachers[0]
            merged = len(students) > 1 or len(teachers) > 1
            barred = {int(labels[at])} if merged else set()
            theirs = {int(kept["labels"][where])} if merged else set()
            p, q, rest_p = [], [], kept["tail"][where][-1].exp()
            heated = kept["logprobs"][where] / temperature
            heated = heated - heated.logsumexp(0) + (1 - rest_p).log()
            own_V = (logprob[at] / temperature).log_softmax(0)
            for index, value in zip(kept["ids"][where], heated, strict=True):
                mine = same.get(int(index))
                if mine not in known or mine in barred or int(index) in theirs:
                    rest_p = rest_p + value.exp()
                else:
                    p.append(value.exp())
                    q.append(own_V[mine].exp())
            q_rest = 1 - sum(q)
            is_all = len(q) == tiny.VOCAB
            assert not is_all
            total = total + temperature**2 * diverges([*p, rest_p], [*q, q_rest], kind)
            if merged:
                q_span = torch.stack([logprob[n, labels[n]] for n in students]).sum().exp()
                nats = [kept["label_logprob"][m] for m in teachers]
                p_span = torch.stack(nats).sum().exp()
                total = total + diverges([p_span, 1 - p_span], [q_span, 1 - q_span], kind)
    return total


def dense_by_rank(case: Across, answer: Any, model: Any, top_k: int) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.double)
    for logprob, _, begins, kept in begun(case, answer, model):
        for students, teachers in begins:
            p = kept["logprobs"][teachers[0]].exp().sort(descending=True).values
            q = logprob[students[0]].exp().sort(descending=True).values
            gaps = (p - q[:top_k]).abs().sum()
            tail = kept["tail"][teachers[0]][-1].exp()
            total = total + gaps + (tail - q[top_k:].sum()).abs()
    return total


def diverges(teacher: list, student: list, kind: str) -> torch.Tensor:
    p, q = torch.stack(teacher).double(), torch.stack(student)
    if kind == "total_variation":
        return (p - q).abs().sum() / 2
    first, second = (p, q) if kind == "forward_kl" else (q, p)
    return torch.where(first > 0, first * (first.log() - second.log()), 0.0).sum()


def begun(case: Across, answer: Any, model: Any) -> Any:
    """Of every document: the student's log-probabilities [T, V], the labels [T], the spans that are
    learnt whole as positions of both, and what the teacher shipped by its positions."""
    own, others = tokenizer(tiny.VOCAB), tokenizer(case.teacher_vocab)
    told, first = answer.targets.arrays(), 0
    pairs = zip(documents(case.student_rows), documents(case.teacher_rows), strict=True)
    for (ids, mask), (theirs, their_mask) in pairs:
        logits = model(torch.tensor(ids)[None].long()).logits[0]
        number = np.full(len(theirs), -1)
        number[their_mask > 0] = first + np.arange(int(their_mask.sum()))
        first += int(their_mask.sum())
        kept: dict = {"ids": {}, "logprobs": {}, "tail": {}, "label_logprob": {}, "labels": {}}
        for place in np.flatnonzero(number >= 0).tolist():
            m = number[place]
            kept["ids"][place] = told.kept["ids_NK"][m]
            kept["logprobs"][place] = torch.tensor(told.kept["logprobs_NK"][m]).double()
            kept["tail"][place] = torch.tensor(told.kept["log_tail_NS"][m]).double()
            kept["label_logprob"][place] = torch.tensor(told.label_logprob_N[m]).double()
            kept["labels"][place] = theirs[place + 1]
        spans = spans_of((ids, mask, own), (theirs, their_mask, others))
        yield logits.log_softmax(-1), np.append(ids[1:], 0), spans, kept


def spans_of(student: Any, teacher: Any) -> list[tuple[list[int], list[int]]]:
    """Positions of both models between neighbouring places at which tokens of both end."""
    ends = [
        [length(ids[: n + 1], own) for n in range(len(ids))] for ids, _, own in (student, teacher)
    ]
    common, found = sorted(set(ends[0]) & set(ends[1])), []
    for begin, end in pairwise(common):
        sides, is_whole = [], True
        for (ids, mask, _), own in zip((student, teacher), ends, strict=True):
            tokens = [n for n in range(1, len(ids)) if begin < own[n] <= end]
            is_whole &= all(mask[n - 1] for n in tokens)
            sides.append([n - 1 for n in tokens])
        if is_whole:
            found.append(tuple(sides))
    return found


def length(ids: np.ndarray, own: Any) -> int:
    """Characters of ASCII text, and one more for its end."""
    text = own.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text) + int(ids[-1] == own.eos_token_id)


def documents(rows: Rows) -> Any:
    columns = (rows.column(name) for name in ("input_ids", "doc_starts", "loss_mask"))
    for ids, starts, mask in zip(*columns, strict=True):
        yield from zip(np.split(ids, starts[1:]), np.split(mask, starts[1:]), strict=True)
