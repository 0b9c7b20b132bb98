"""Drawn ids from given logits, on their whole way from the teacher to the loss.

N positions   V ids   K ids kept per position
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.data.rows import Rows
from shared.targets.asks.drawn_ids import DrawnIds
from shared.targets.draws import uniforms
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from student_trainer.losses.kernel.drawn import DrawnTargets
from teacher_service.scoring.answering import encode
from teacher_service.scoring.drawing import draw
from teacher_service.scoring.scoring import ScoringHead
from tests.answers import decoded, question_of

Selector = Literal["threshold", "sampled"]


def row_of(num: int) -> Rows:
    """One row with loss at `num` positions."""
    return Rows.build(
        domains=["any"],
        indices=[0],
        input_ids=[np.arange(num + 1)],
        doc_starts=[np.zeros(1)],
        loss_masks=[np.append(np.ones(num), 0)],
    )


def drawn_answer(
    logits_NV: Tensor,
    spec: Question,
    *,
    rows: Rows | None = None,
    chunk: int | None = None,
    times: int = 1,
) -> SoftTargets:
    """What a teacher with these logits, all of them again and again, answers about rows with as
    many loss positions."""
    num = times * len(logits_NV)
    rows = rows or row_of(num)
    ask = spec.ask
    assert isinstance(ask, DrawnIds)
    found = draw(
        torch.eye(len(logits_NV)).repeat(times, 1),
        ScoringHead(logits_NV.T.contiguous()),
        torch.zeros(num, dtype=torch.long),
        uniform_NU=torch.from_numpy(uniforms(rows, seed=ask.seed, count=ask.num_uniforms)),
        selector=ask.selector,
        num_ids=ask.num_ids,
        shared_vocab=ask.shared_vocab,
        temperature=ask.temperature,
        chunk=chunk,
    )
    return SoftTargets.build(
        question=spec,
        teacher={},
        row_hashes=rows.hashes(),
        num_targets_R=rows.num_loss_tokens(),
        columns=encode(replace(found, label_logprob_N=found.label_logprob_N.clamp(min=-1e4)), spec),
    )


def drawn_spec(
    selector: Selector, top_k: int, vocab: int, *, temperature: float = 1.0, **more
) -> Question:
    """A question to which ids are drawn."""
    return question_of(
        top_k,
        vocab,
        temperatures=(temperature,),
        selector=selector,
        entropy=True,
        **({"encoding": "fp32"} | more),
    )


def dense_weights(answer: SoftTargets) -> Tensor:
    """The weight of every id, float64 [N, V]."""
    arrays, vocab = decoded(answer), answer.question.ask.shared_vocab
    weights_NV = torch.zeros(len(arrays.ids_NK), vocab, dtype=torch.float64)
    weights_NK = torch.tensor(arrays.logprobs_NK).double().exp()
    return weights_NV.scatter_add_(1, torch.tensor(arrays.ids_NK), weights_NK)


def draws_of(logits_NV: Tensor, spec: Question, *, count: int) -> Iterator[SoftTargets]:
    """Answers to the draws 0, 1, 2 ... of one row."""
    rows = row_of(len(logits_NV))
    for number in range(count):
        yield drawn_answer(logits_NV, spec, rows=rows.with_draws(np.array([number])))


def drawn_targets(answer: SoftTargets) -> DrawnTargets:
    """The answer as the loss takes it."""
    arrays = decoded(answer)
    assert arrays.entropy_N is not None
    return DrawnTargets(
        torch.tensor(arrays.ids_NK),
        torch.tensor(arrays.logprobs_NK),
        torch.tensor(arrays.log_tail_NS[:, 0]),
        torch.tensor(arrays.entropy_N),
        answer.question.ask.temperature,
    )
