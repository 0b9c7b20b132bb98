"""Divergences as TRL and Liger compute them: no dependencies, but `make test-all` installs both.

    pip install -e '.[oracles]'

N positions   V vocabulary   K ids kept per position
"""

import importlib
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.student_trainer.losses.dense import Case, gradients, relative_error
from tests.student_trainer.losses.kernel.test_teacher_states import HEADS, Exact
from tests.student_trainer.losses.terms.test_divergences_in_training import found

# The names of `textbook.CASES` and TRL's and Liger's beta.
CASES = {"forward_kl": 0.0, "jsd .1": 0.1, "jsd .5": 0.5, "jsd .9": 0.9, "reverse_kl": 1.0}
every_case = pytest.mark.parametrize(("name", "beta"), CASES.items())
OPTIONS = [options for _, options in HEADS.values()]


def imported(name: str) -> Any:
    """A module; the test is skipped where its library is not installed at all."""
    library = name.partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install -e '.[oracles]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL calls experimental
        return importlib.import_module(name)


def agree(pair: tuple[Tensor, Tensor], losses: tuple[Tensor, Tensor], case: Case) -> None:
    """Values and the gradients of the student's states and head, within 1e-5."""
    torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    slopes = zip(*(gradients(loss, case) for loss in losses), strict=True)
    assert max(relative_error(one, other) for one, other in slopes) < 1e-5


@every_case
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("options", OPTIONS, ids=HEADS)
def test_whole_vocabularies_equal_trls_with_every_head(name, beta, temperature, options):
    function = imported("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    exact = Exact.random(**options)
    loss, value_N = exact.found(name, temperature=temperature, times_temperature_squared=False)
    heads = (exact.case.head, exact.states.teacher.head)
    how = [x for head in heads for x in (head.logit_scale, head.soft_cap)]
    other_N, *_ = function.apply(
        *exact.case.leaves,
        exact.states.hidden_NE,
        heads[1].weight_VD,
        heads[1].bias_V,
        beta,
        temperature,
        *how,
    )
    agree((value_N, other_N), (loss, other_N.sum()), exact.case)


@every_case
def test_whole_vocabularies_equal_ligers(name, beta):
    function = imported("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False
    )
    exact = Exact.random()
    loss, value_N = exact.found(name, temperature=2.0, times_temperature_squared=False)
    student = (exact.case.hidden_ND, exact.case.head.weight_VD)
    teacher = (exact.states.hidden_NE, exact.states.teacher.head.weight_VD)
    total = len(value_N) * function(*student, *teacher, exact.case.label_N)
    agree((value_N.sum(), total), (loss, total), exact.case)


@every_case
@pytest.mark.parametrize("k", [1, 8])
def test_ids_and_a_tail_equal_trls_bucket(name, beta, k):
    """TRL's tail is 1 less the kept mass; the case is flat enough for that."""
    module = imported("trl.experimental.server_distillation.server_distillation_trainer")
    case = Case.random(scale=1.0, kind=torch.float32)
    targets, student_NV = case.targets(k), case.head.logits(case.hidden_ND)
    kept_NK = torch.ones_like(targets.ids_NK, dtype=torch.bool)
    own_NK = student_NV.log_softmax(-1).gather(1, targets.ids_NK)
    student, teacher = (
        module._add_tail_bucket(x_NK, kept_NK) for x_NK in (own_NK, targets.logprobs_NK)
    )
    other_N = module._jsd_divergence(student[0], teacher[0], beta, student[1]).sum(-1)
    loss, value_N = found(case, name, targets)
    agree((value_N, other_N), (loss, other_N.sum()), case)
