"""A teacher that has nothing to teach is named before training."""

from shared.config.mixture import FixedMixture
from student_trainer.evaluations import weak_teachers
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
