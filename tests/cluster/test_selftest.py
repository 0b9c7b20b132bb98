"""`tutelage selftest` through the public path, and that each of its checks can fail."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.cli import main
from cluster.commands import load
from cluster.preparation import Prepared, prepare_run, run_plan
from cluster.selftest import checks, command
from cluster.selftest.checks import Check
from cluster.selftest.command import plain
from cluster.selftest.subject import Subject, subject_of
from shared import soft_targets
from shared.rows import Rows
from shared.soft_targets import SoftTargets, TargetArrays
from shared.target_spec import TargetSpec
from student_trainer.losses import token_adaptive
from student_trainer.losses.buckets import Buckets, p_log, p_log_ratio
from student_trainer.losses.divergences import DIVERGENCES
from student_trainer.losses.token_adaptive import LabelledBuckets, tkd
from teacher_service import drawing
from teacher_service.engine import HFEngine
from tests.answers import encoded
from tests.cluster.jobs import write_job
from tests.student_trainer.processes import LocalTeacher
from tests.tiny import Pair

JUDGED = (
    "direction",
    "remote equals local",
    "student := teacher",
    "mask and shift",
    "micro-batch split",
    "payload",
)
MEASURED = ("tokens/s", "bottleneck")
NAMES = JUDGED + MEASURED

BOTH = ("value", "gradient")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MEASURED_S", 0.05)


def prepared_with(folder: Path, pair: Pair, **targets) -> Prepared:
    return prepare_run(plain(load(write_job(folder, pair, targets=targets), [])))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_pair) -> Prepared:
    return prepared_with(tmp_path_factory.mktemp("selftest"), tiny_pair, selector="top_k")


Change = Callable[[TargetArrays], TargetArrays]


class Altered(LocalTeacher):
    """A teacher in this process whose answers are changed on the way."""

    def __init__(self, engine: HFEngine, change: Change) -> None:
        super().__init__(engine)
        self._change = change

    def next(self) -> SoftTargets:
        rows, spec = self._asked.popleft()
        found = self._engine.score(rows, spec)
        return SoftTargets.build(
            spec=spec,
            teacher=found.described["teacher"],
            row_hashes=rows.hashes(),
            num_targets_R=rows.num_loss_tokens(),
            columns=encoded(spec, self._change(found.arrays())),
        )


def subject(prepared: Prepared, change: Change = lambda arrays: arrays) -> Subject:
    engine = HFEngine.load(prepared.teacher.model)
    plan = run_plan(prepared, run_dir=Path(), teacher=engine.fingerprint)
    return subject_of(plan, lambda rank: Altered(engine, change))


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def verdicts(found: Iterable[Check]) -> dict[str, bool]:
    """Of the checks that have one."""
    return {check.name: check.ok for check in found if check.ok is not None}


def test_the_command_says_a_line_for_each_check_and_leaves_nothing(
    ray_cluster, tmp_path, tiny_pair, capsys
):
    from teacher_service.service import list_services

    job = write_job(tmp_path, tiny_pair)
    assert main(["selftest", str(job), "targets.top_k=32"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("ok ", "failed ", "- "))]
    assert [line[8:28].strip() for line in lines] == list(NAMES)
    assert [line[:8].strip() for line in lines] == ["ok"] * len(JUDGED) + ["-"] * len(MEASURED)
    assert "threshold 32 holds" in said
    assert "- (no loss)" in said or "predicts" in said
    assert "replicas per worker keep pace" in said
    assert list_services() == []
    assert not list((tmp_path / "cache" / "selftest").iterdir())


def test_a_pair_that_cannot_work_is_refused_before_anything_starts(tmp_path, tiny_pair, capsys):
    job = write_job(tmp_path, tiny_pair)
    assert main(["selftest", str(job), "targets.top_k=600"]) == 2
    assert "share 512 tokens" in capsys.readouterr().err


def test_the_answers_of_a_sound_teacher_pass(prepared):
    found = by_name(
        [
            checks.direction(),
            checks.remote_equals_local(subject(prepared)),
            *checks.same_model(subject(prepared)),
            *checks.own_student(subject(prepared)),
        ]
    )
    assert tuple(found) == NAMES
    assert verdicts(found.values()) == dict.fromkeys(JUDGED, True), found


def drawn_subject(folder: Path, pair: Pair, selector: str) -> Subject:
    prepared = prepared_with(folder, pair, selector=selector, top_k=16)
    engine = HFEngine.load(prepared.teacher.model)
    plan = run_plan(prepared, run_dir=Path(), teacher=engine.fingerprint)
    return subject_of(plan, lambda rank: LocalTeacher(engine))


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_ids_that_are_drawn_pass(tmp_path, tiny_pair, selector: str):
    drawn = drawn_subject(tmp_path, tiny_pair, selector)
    assert drawn.spec.selector == selector
    found = [checks.remote_equals_local(drawn), *checks.same_model(drawn)]
    found += checks.own_student(drawn)
    assert all(verdicts(found).values()), found
    assert "from drawn ids" in by_name(found)["student := teacher"].said


@pytest.mark.parametrize("selector", ["threshold", "sampled"])
def test_ids_drawn_beside_the_teachers_probability_fail(
    tmp_path, tiny_pair, monkeypatch, selector: str
):
    found_in = drawing._found_in

    def beside(*parts: torch.Tensor) -> torch.Tensor:
        return (found_in(*parts) + 1) % 512

    monkeypatch.setattr(drawing, "_found_in", beside)
    found = checks.same_model(drawn_subject(tmp_path, tiny_pair, selector))
    assert not by_name(found)["student := teacher"].ok


def divergences(folder: Path, pair: Pair, losses: list[dict], **targets) -> Prepared:
    asked = {"selector": "top_k", "top_k": 16} | targets
    return prepare_run(plain(load(write_job(folder, pair, losses=losses, targets=asked), [])))


def looked_at(said: str) -> dict[str, list[str]]:
    """The losses whose value and gradient a sentence speaks of."""
    found = re.findall(r"(value|gradient) [\d.e+-]+ \((.*?)\)", said)
    return {what: names.split(", ") for what, names in found}


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


def test_a_teacher_that_no_student_can_be_is_not_called_ok(prepared):
    found = subject(prepared)
    ((name, teacher),) = found.config.teachers.items()
    teachers = {name: teacher.model_copy(update={"quantisation": "int8"})}
    config = found.config.model_copy(update={"teachers": teachers})
    quantised = replace(found, plan=replace(found.plan, config=config))
    assert by_name(checks.same_model(quantised))["student := teacher"].ok is None


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
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

    def unscaled(arrays: TargetArrays) -> TargetArrays:
        return replace(arrays, log_tail_NS=arrays.log_tail_NS[:, [0] * 2])

    losses = [{"kind": "forward_kl", "temperature": 2.0}]
    pair = divergences(tmp_path, tiny_pair, losses)
    assert by_name(checks.same_model(subject(pair)))["student := teacher"].ok
    assert not by_name(checks.same_model(subject(pair, unscaled)))["student := teacher"].ok


@pytest.mark.parametrize("encoding", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_atkd_of_a_student_that_is_its_teacher_vanishes(
    tmp_path, tiny_pair, direction: str, encoding: str
):
    losses = [{"kind": "atkd", "direction": direction}, {"kind": "jsd"}]
    pair = subject(divergences(tmp_path, tiny_pair, losses, encoding=encoding))
    check = by_name(checks.same_model(pair))["student := teacher"]
    assert check.ok, check.said
    assert looked_at(check.said) == {what: ["atkd", "jsd"] for what in BOTH}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_atkd_of_a_step_cut_otherwise_is_the_same(tmp_path, tiny_pair, direction: str):
    losses = [{"kind": "atkd", "direction": direction}]
    pair = subject(divergences(tmp_path, tiny_pair, losses))
    check = by_name(checks.own_student(pair))["micro-batch split"]
    assert check.ok, check.said


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_labels_of_another_position_fail_with_atkd(tmp_path, tiny_pair, direction: str):
    """No other loss sees what was shipped of the labels."""

    def rolled(arrays: TargetArrays) -> TargetArrays:
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


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("part", "wrong"), [("tkd", unweighted), ("dkd", kept_alone), ("tkd", above), ("dkd", above)]
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
    [("soft_cross_entropy", without_tail), ("taid", without_tail), ("total_variation", squared)],
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


def shifted(arrays: TargetArrays) -> TargetArrays:
    """Every position answers as the one before it should."""
    names = ("ids_NK", "logprobs_NK", "log_tail_NS", "label_logprob_N")
    return replace(arrays, **{name: np.roll(getattr(arrays, name), 1, 0) for name in names})


def test_a_teacher_that_is_off_by_one_position_fails(prepared):
    off = subject(prepared, shifted)
    found = by_name(checks.same_model(off))
    assert not found["student := teacher"].ok
    assert not found["mask and shift"].ok
    assert not checks.remote_equals_local(off).ok


def test_a_teacher_whose_answer_changes_by_a_bit_is_not_the_local_one(prepared):
    def nudged(arrays: TargetArrays) -> TargetArrays:
        label_N = np.nextafter(arrays.label_logprob_N, np.float32(-100), dtype=np.float32)
        return replace(arrays, label_logprob_N=label_N)

    assert not checks.remote_equals_local(subject(prepared, nudged)).ok


def test_a_mask_that_reaches_over_the_end_of_a_document_fails(prepared):
    rows = subject(prepared).rows
    assert checks.mask_is_sound(rows)
    masks = [np.ones_like(mask) for mask in rows.column("loss_mask")]
    place = rows.table.schema.get_field_index("loss_mask")
    column = pa.array([mask.tolist() for mask in masks], rows.table.schema.field(place).type)
    assert not checks.mask_is_sound(Rows(rows.table.set_column(place, "loss_mask", column)))


def test_a_mean_over_each_micro_batch_fails(prepared):
    """Each unit divided by its own tokens, as if rows of few tokens counted more."""
    sound = subject(prepared)
    objective = checks.objective_of(sound, sound.config.student, sound.config.losses)
    assert checks.split_invariance(objective, sound).ok

    def mean_of_each(batch, *, multiplier: float):
        return objective(batch, multiplier=1 / len(batch["label_N"]))

    wrong = partial(mean_of_each)
    wrong.zero_grad, wrong.parameters = objective.zero_grad, objective.parameters  # type: ignore[attr-defined]
    assert not checks.split_invariance(wrong, sound).ok  # type: ignore[arg-type]


def test_a_divergence_in_the_wrong_direction_fails(monkeypatch):
    def swapped(*arguments, terms, **options):
        return token_losses(*arguments, terms=terms[::-1], **options)

    token_losses = checks.token_losses
    assert checks.direction().ok
    monkeypatch.setattr(checks, "token_losses", swapped)
    assert not checks.direction().ok


def test_an_answer_that_holds_nothing_of_the_teachers_mass_fails(prepared):
    def emptied(arrays: TargetArrays) -> TargetArrays:
        return replace(arrays, log_tail_NS=np.zeros_like(arrays.log_tail_NS))

    assert checks.payload(subject(prepared)).ok
    assert not checks.payload(subject(prepared, emptied)).ok


def test_drawn_ids_whose_weights_do_not_sum_to_one_fail(tmp_path, tiny_pair, monkeypatch):
    drawn = drawn_subject(tmp_path, tiny_pair, "threshold")
    assert checks.payload(drawn).ok
    log_weights = soft_targets.log_weights
    monkeypatch.setattr(soft_targets, "log_weights", lambda *parts: log_weights(*parts) + 0.01)
    assert not checks.payload(drawn).ok


def test_a_check_that_fails_is_named_in_a_sentence_with_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_examined", lambda *pair, **how: ["payload"])
    assert main(["selftest"]) == 1
    printed = capsys.readouterr()
    assert "selftest failed at payload; do not train with these models" in printed.err
    assert "All is well" not in printed.out


def test_the_replica_ratio_is_that_of_the_speeds(prepared, monkeypatch):
    """A worker of 900 tokens a second eats what 2.25 replicas of 400 make."""
    sound = subject(prepared)
    monkeypatch.setattr(checks, "teacher_speed", lambda subject: 400.0)
    monkeypatch.setattr(checks, "student_speed", lambda objective, subject: 900.0)
    found = by_name(checks.speeds(torch.nn.Identity(), sound))  # type: ignore[arg-type]
    assert found["bottleneck"].said.startswith("the teacher; 2.25 replicas per worker")
    assert "replicas=3 for student.workers=1, now 1" in found["bottleneck"].said
    monkeypatch.setattr(checks, "student_speed", lambda objective, subject: 100.0)
    found = by_name(checks.speeds(torch.nn.Identity(), sound))  # type: ignore[arg-type]
    assert found["bottleneck"].said.startswith("the student; 0.25 replicas per worker")
    assert not verdicts(found.values())


def test_a_config_is_examined_without_what_would_answer_from_disk(tmp_path, tiny_pair):
    job = write_job(
        tmp_path,
        tiny_pair,
        losses=[{"kind": "atkd"}, {"kind": "cross_entropy"}],
        targets={"store": str(tmp_path / "store"), "teacher_free": True, "top_k": 8},
    )
    found = plain(load(job, []))
    assert [loss.kind for loss in found.losses] == ["atkd", "cross_entropy"]
    assert found.targets.store is None
    assert not found.targets.teacher_free
    assert found.targets.top_k == 8


def test_a_config_of_hard_labels_alone_is_examined_with_forward_kl(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair, losses=[{"kind": "cross_entropy"}])
    assert [loss.kind for loss in plain(load(job, [])).losses] == ["cross_entropy", "forward_kl"]


@pytest.mark.parametrize("kind", ["forward_kl", "atkd"])
def test_states_are_examined_as_ids_are(tmp_path, tiny_pair, kind: str):
    """The payload is the last state of 48 numbers of 4 bytes, and the label."""
    job = write_job(tmp_path, tiny_pair, losses=[{"kind": kind}], targets={"exact": "last_hidden"})
    prepared = prepare_run(plain(load(job, [])))
    engine = HFEngine.load(prepared.teacher.model)
    engine.cache = prepared.config.paths.cache
    head = engine.ship_head()
    plan = run_plan(prepared, run_dir=Path(), teacher=engine.fingerprint, head=head)
    assert plan.target_spec == TargetSpec(
        0, 512, head=head.digest, states=head.states, states_width=head.states_width
    )
    found = subject_of(plan, lambda rank: LocalTeacher(engine))
    assert all(verdicts([*checks.same_model(found), *checks.own_student(found)]).values())
    assert checks.payload(found).said.startswith("196 bytes per token; the last state and a head")


def test_a_pair_whose_student_names_ids_is_looked_at_without_its_naming(tmp_path, tiny_pair):
    targets = {"student_ids": 8, "top_k": 24}
    job = write_job(tmp_path, tiny_pair, targets=targets, losses=[{"kind": "reverse_kl"}])
    looked_at = subject(prepare_run(plain(load(job, []))))
    assert looked_at.spec.top_k == 32
    assert checks.payload(looked_at).ok
