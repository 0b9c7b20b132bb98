"""Answers made up for the tests of the wire."""

import dataclasses

import numpy as np
import pyarrow as pa

from shared.data.rows import Rows
from shared.targets.question import Question
from shared.targets.soft_targets import SoftTargets
from tests.answers import Given, encoded
from tests.shared.data.test_rows import rows

TEACHER = {"model": "a teacher", "dtype": "float32"}
UNIT = rows([20, 1, 13])  # the row of one token has no target


def random_arrays(spec: Question, num_targets: int, *, seed: int = 0) -> Given:
    """Log-probabilities of a random softmax, descending, and a hidden state per layer."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_targets, 4 * spec.ask.num_ids)) * 4
    logprobs = np.sort(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[:, ::-1]
    num_tails = len(spec.as_dict()["temperatures"])
    tail = np.logaddexp.reduce(logprobs[:, spec.ask.num_ids :], axis=1)
    return Given(
        ids_NK=rng.integers(0, spec.ask.shared_vocab, (num_targets, spec.ask.num_ids)),
        logprobs_NK=logprobs[:, : spec.ask.num_ids].astype(np.float32),
        log_tail_NS=np.stack([tail] * num_tails, 1).astype(np.float32),
        label_logprob_N=logprobs[:, 3].astype(np.float32),
        hidden_ND={
            layer: (rng.normal(size=(num_targets, 6)) * 30).astype(np.float32)
            for layer in spec.hidden.layers
        },
        entropy_N=rng.random(num_targets, np.float32) * 6 if spec.ask.with_entropy else None,
    )


def ascending(arrays: Given) -> Given:
    """The same selection in the order of its ids."""
    order_NK = np.argsort(arrays.ids_NK, axis=1, kind="stable")
    ids_NK, logprobs_NK = (
        np.take_along_axis(each, order_NK, axis=1) for each in (arrays.ids_NK, arrays.logprobs_NK)
    )
    return dataclasses.replace(arrays, ids_NK=ids_NK, logprobs_NK=logprobs_NK)


def answer(spec: Question, *, unit: Rows = UNIT, arrays: Given | None = None):
    """The SoftTargets of a unit and what they were made from, in the order of ids."""
    counts = unit.num_loss_tokens()
    arrays = arrays or random_arrays(spec, int(counts.sum()))
    built = SoftTargets.build(
        question=spec,
        teacher=TEACHER,
        row_hashes=unit.hashes(),
        num_targets_R=counts,
        columns=encoded(spec, arrays),
    )
    return built, ascending(arrays)


def shipped(targets: SoftTargets) -> SoftTargets:
    """Through an Arrow stream and back."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, targets.table.schema) as writer:
        writer.write_table(targets.table)
    return SoftTargets(pa.ipc.open_stream(sink.getvalue()).read_all())
