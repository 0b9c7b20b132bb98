"""What following a step sees of its logits.

N positions   V head rows   D hidden width
"""

from types import SimpleNamespace

import pytest
import torch

from cluster.probing.following import Chunks, Followed
from cluster.probing.probe import refuse_unbounded
from cluster.sizing.measured import Logits, Probe, ProcessMemory, TeacherProbe
from shared.errors import TutelageError
from student_trainer.losses.kernel.primitive import Head, default_chunk_rows
from student_trainer.losses.registry import terms_of
from student_trainer.losses.token_losses import token_losses

N, V, D = 9_000, 4_096, 8
CROSS_ENTROPY = SimpleNamespace(kind="cross_entropy", weight=1.0, label_smoothing=0.0)


def followed(loss, rows: int) -> Followed:
    hidden_ND = torch.randn(N, D, requires_grad=True)
    weight_VD = torch.randn(V, D, requires_grad=True)
    label_N = torch.randint(V, (N,))
    with Followed(Chunks((V,), D, rows), [hidden_ND, weight_VD]) as found:
        loss(hidden_ND, weight_VD, label_N).backward()
    return found


def whole(hidden_ND, weight_VD, label_N):
    return torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.T, label_N)


def chunked(hidden_ND, weight_VD, label_N):
    terms = terms_of([CROSS_ENTROPY])
    return token_losses(hidden_ND, Head(weight_VD), label_N=label_N, terms=terms).loss


def test_the_logits_of_all_positions_are_seen_where_a_step_makes_them():
    found = followed(whole, rows=128)
    assert found.widest == N
    assert found.most >= 4 * N * V


def test_those_of_the_losses_are_a_chunk():
    rows = default_chunk_rows(V, num_ids=1)
    assert rows < N
    found = followed(chunked, rows)
    assert 0 < found.widest <= rows
    assert found.most < 4 * N * V


@pytest.mark.parametrize(("widest", "chunk"), [(257, 256), (9_000, 256)])
def test_a_probe_refuses_a_side_that_makes_more(widest, chunk):
    memory = ProcessMemory({"weights": 1}, 0, 0)
    bounded = TeacherProbe(memory, Logits(256, N, 256, V), 1, 1.0, 1, 1)
    asked = TeacherProbe(memory, Logits(widest, N, None, V), 1, 1.0, 1, 1)
    beyond = TeacherProbe(memory, Logits(widest, N, chunk, V), 1, 1.0, 1, 1)
    refuse_unbounded(Probe([], {"t": [bounded, asked]}, 23))
    with pytest.raises(TutelageError, match=rf"t made a tensor of {widest:,} x 4,096 logits"):
        refuse_unbounded(Probe([], {"t": [bounded, beyond]}, 23))
