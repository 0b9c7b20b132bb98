"""A teacher that has nothing to teach is named before training, one too far away is refused."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from shared.config.mixture import FixedMixture
from shared.errors import HandshakeError
from shared.run.metrics import DomainEvaluation
from student_trainer.evaluation.evaluations import refuse_far_student, starting_kl, weak_teachers
from tests.answers import question_of
from tests.cluster.run_dirs import controlled


def test_every_domain_whose_teacher_is_no_better_is_named_with_both_numbers():
    config = controlled(FixedMixture(), domains=("code", "law", "math"))
    before = {
        "code": {"teacher_nll": 2.0, "student_nll": 3.0},
        "law": {"teacher_nll": 2.5, "student_nll": 2.25},
        "math": {"teacher_nll": None, "student_nll": 2.0},
    }
    (sentence,) = weak_teachers(config, before)
    assert "the teacher main is no better than the student on validation text of law" in sentence
    assert "2.500 against 2.250 nats per token" in sentence
    equal = {"law": {"teacher_nll": 2.25, "student_nll": 2.25}}
    assert len(weak_teachers(config, equal)) == 1


def evaluated(kl: float | None) -> DomainEvaluation:
    return DomainEvaluation(3.0, None if kl is None else 2.0, kl, "full", 100)


@pytest.mark.parametrize("kl", [math.log(32) + 1e-6, math.nan, math.inf])
def test_step_0_prints_the_kl_of_the_unchanged_student_and_more_than_ln_v_is_a_stop(kl):
    part = SimpleNamespace(validation_question=question_of(32, 32))
    config = controlled(FixedMixture(), domains=("code", "law"))
    plan: Any = SimpleNamespace(config=config, by_teacher={"main": part})
    near = {"code": evaluated(1.25), "law": evaluated(math.log(32))}
    refuse_far_student(plan, near)
    assert starting_kl(near) == (
        "KL of the unchanged student to its teacher, nats per token: code 1.250, law 3.466"
    )
    with pytest.raises(
        HandshakeError, match=r"teacher main is .* of law.*ln 32 = 3.466"
    ) as refused:
        refuse_far_student(plan, near | {"law": evaluated(kl)})
    assert refused.value.exit_code == 2
    assert "evaluation.far_student=say" in str(refused.value)


@pytest.mark.parametrize("kl", [math.log(32) + 1, math.nan, math.inf])
def test_a_student_that_is_far_away_learns_where_the_config_says_so_but_not_from_no_number(kl):
    part = SimpleNamespace(validation_question=question_of(32, 32))
    config = controlled(FixedMixture(), domains=("law",), evaluation={"far_student": "say"})
    plan: Any = SimpleNamespace(config=config, by_teacher={"main": part})
    if math.isfinite(kl):
        refuse_far_student(plan, {"law": evaluated(kl)})
        return
    with pytest.raises(HandshakeError):
        refuse_far_student(plan, {"law": evaluated(kl)})


def test_without_a_teacher_there_is_no_kl_to_say():
    assert starting_kl({"code": evaluated(None)}) is None
