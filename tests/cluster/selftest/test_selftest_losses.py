"""Losses in `selftest`: of a student that is its teacher they vanish where their laws say so, and
one that does not fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.commands.selftest import plain
from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run
from cluster.selftest import checks
from student_trainer.losses.kernel.buckets import Buckets, p_log, p_log_ratio
from student_trainer.losses.kernel.labelled import LabelledBuckets
from student_trainer.losses.terms import token_adaptive
from student_trainer.losses.terms.divergences import DIVERGENCES
from student_trainer.losses.terms.token_adaptive import tkd
from tests.answers import Given
from tests.cluster.jobs import write_job
from tests.cluster.selftest.examined import by_name, looked_at, subject
from tests.telling import telling
from tests.tiny import Pair

BOTH = ("value", "gradient")


def divergences(folder: Path, pair: Pair, losses: list[dict], **targets) -> Prepared:
    asked = {"selector": "top_k", "top_k": 16} | targets
    return prepare_run(plain(load(write_job(folder, pair, losses=losses, targets=asked), [])))


@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        (["forward_kl", "forward_kl"], {what: ["forward_kl", "forward_kl_2"] for what in BOTH}),
        (["soft_cross_entropy"], {"gradient": ["soft_cross_entropy"]}),
        (["total_variation", "cross_entropy"], {"value": ["total_variation"]}),
    ],
)
def test_the_sentence_names_the_losses_that_were_looked_at(
    tmp_path, tiny_pair, kinds: list[str], asked: dict[str, list[str]]
):
    pair = subject(divergences(tmp_path, tiny_pair, [{"kind": kind} for kind in kinds]))
    assert looked_at(by_name(checks.same_model(pair))["student := teacher"].said) == asked


def test_losses_without_a_law_at_the_teacher_are_said_to_have_none(tmp_path, tiny_pair):
    losses = [{"kind": "hidden_states", "layers": {1: 1}}]
    pair = subject(divergences(tmp_path, tiny_pair, losses))
    check = by_name(checks.same_model(pair))["student := teacher"]
    assert check.said.endswith("no divergence among its losses")


@pytest.mark.parametrize("encoding", telling(["fp16", "int8", "fp32"], "int8"))
def test_every_divergence_of_a_student_that_is_its_teacher_vanishes(
    tmp_path, tiny_pair, encoding: str
):
    losses = [{"kind": kind, "temperature": 2.0} for kind in DIVERGENCES]
    pair = subject(divergences(tmp_path, tiny_pair, losses, encoding=encoding))
    check = by_name(checks.same_model(pair))["student := teacher"]
    assert check.ok, check.said
    assert looked_at(check.said) == {
        "value": [kind for kind, entry in DIVERGENCES.items() if entry.laws.zero_value],
        "gradient": [kind for kind, entry in DIVERGENCES.items() if entry.laws.zero_gradient],
    }


def test_tails_of_another_temperature_fail(tmp_path, tiny_pair):
    """The KL at temperature 1 does not see them."""

    def unscaled(arrays: Given) -> Given:
        return replace(arrays, log_tail_NS=arrays.log_tail_NS[:, [0] * 2])

    losses = [{"kind": "forward_kl", "temperature": 2.0}]
    pair = divergences(tmp_path, tiny_pair, losses)
    assert by_name(checks.same_model(subject(pair)))["student := teacher"].ok
    assert not by_name(checks.same_model(subject(pair, unscaled)))["student := teacher"].ok


@pytest.mark.parametrize("encoding", telling(["fp16", "int8", "fp32"], "int8"))
@pytest.mark.parametrize("direction", telling(["forward", "reverse"], "reverse"))
def test_atkd_of_a_student_that_is_its_teacher_vanishes(
    tmp_path, tiny_pair, direction: str, encoding: str
):
    losses = [{"kind": "atkd", "direction": direction}, {"kind": "jsd"}]
    pair = subject(divergences(tmp_path, tiny_pair, losses, encoding=encoding))
    check = by_name(checks.same_model(pair))["student := teacher"]
    assert check.ok, check.said
    assert looked_at(check.said) == {what: ["atkd", "jsd"] for what in BOTH}


@pytest.mark.parametrize("direction", telling(["forward", "reverse"], "reverse"))
def test_atkd_of_a_step_cut_otherwise_is_the_same(tmp_path, tiny_pair, direction: str):
    losses = [{"kind": "atkd", "direction": direction}]
    pair = subject(divergences(tmp_path, tiny_pair, losses))
    check = by_name(checks.own_student(pair))["micro-batch split"]
    assert check.ok, check.said


@pytest.mark.parametrize("direction", telling(["forward", "reverse"], "forward"))
def test_labels_of_another_position_fail_with_atkd(tmp_path, tiny_pair, direction: str):
    """No other loss sees what was shipped of the labels."""

    def rolled(arrays: Given) -> Given:
        return replace(arrays, label_logprob_N=np.roll(arrays.label_logprob_N, 1))

    for kind, ok in (("forward_kl", True), ("atkd", False)):
        losses = [{"kind": kind} | ({"direction": direction} if kind == "atkd" else {})]
        pair = subject(divergences(tmp_path, tiny_pair, losses), rolled)
        assert by_name(checks.same_model(pair))["student := teacher"].ok == ok


def unweighted(target: LabelledBuckets, learner: LabelledBuckets) -> torch.Tensor:
    """0 where both are equal, but not its gradient."""
    return target.label_N - learner.label_N


def kept_alone(target: LabelledBuckets, learner: LabelledBuckets) -> torch.Tensor:
    return p_log_ratio(target.others_NK, learner.others_NK).sum(-1)


def above(target: LabelledBuckets, learner: LabelledBuckets) -> torch.Tensor:
    """A gradient of 0 where both are equal, but not its value."""
    return tkd(target, learner) + 1


@pytest.mark.parametrize("direction", telling(["forward", "reverse"], "forward"))
@pytest.mark.parametrize(
    ("part", "wrong"),
    telling(
        [("tkd", unweighted), ("dkd", kept_alone), ("tkd", above), ("dkd", above)],
        ("dkd", kept_alone),
        ("tkd", above),
    ),
)
def test_a_part_of_atkd_that_breaks_its_law_at_its_teacher_fails(
    tmp_path, tiny_pair, monkeypatch, part: str, wrong: Callable, direction: str
):
    losses = [{"kind": "atkd", "direction": direction}]
    pair = subject(divergences(tmp_path, tiny_pair, losses))
    assert by_name(checks.same_model(pair))["student := teacher"].ok
    monkeypatch.setattr(token_adaptive, part, wrong)
    assert not by_name(checks.same_model(pair))["student := teacher"].ok


def without_tail(teacher: Buckets, student: Buckets, **_: float) -> torch.Tensor:
    return -p_log(teacher.kept_NK, student.kept_NK).sum(-1)


def squared(teacher: Buckets, student: Buckets, **_: float) -> torch.Tensor:
    return (student.kept_NK.exp() ** 2).sum(-1)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    telling(
        [
            ("soft_cross_entropy", without_tail),
            ("taid", without_tail),
            ("total_variation", squared),
        ],
        ("taid", without_tail),
        ("total_variation", squared),
    ),
)
def test_a_divergence_that_breaks_its_law_at_its_teacher_fails(
    tmp_path, tiny_pair, monkeypatch, kind: str, wrong: Callable
):
    """Gradients of what has no zero, and the value of what has no gradient of zero."""
    pair = subject(divergences(tmp_path, tiny_pair, [{"kind": kind}]))
    assert by_name(checks.same_model(pair))["student := teacher"].ok
    monkeypatch.setitem(DIVERGENCES, kind, replace(DIVERGENCES[kind], function=wrong))
    assert not by_name(checks.same_model(pair))["student := teacher"].ok


def test_what_leaves_the_tail_out_is_said_not_to_vanish(tmp_path, tiny_pair):
    losses = [{"kind": "reverse_kl"}]
    pair = subject(divergences(tmp_path, tiny_pair, losses, selector="renormalised"))
    check = by_name(checks.same_model(pair))["student := teacher"]
    assert check.ok
    assert "no loss vanishes, as renormalised leaves out the teacher's tail" in check.said
