"""`tutelage selftest` through the public path, and that each of its checks can fail."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.cli import main
from cluster.commands import selftest
from cluster.commands.selftest import plain
from cluster.planning.loading import load
from cluster.planning.preparation import Prepared, prepare_run, run_plan
from cluster.selftest import checks
from cluster.selftest.subject import Subject, subject_of
from shared.data.rows import Rows
from shared.targets.asks import drawn_ids
from teacher_service.engine.hf import HFEngine
from teacher_service.scoring import drawing
from tests.answers import Given, question_of
from tests.cluster.jobs import two_teachers, write_job
from tests.cluster.selftest.examined import by_name, subject, verdicts
from tests.student_trainer.processes import LocalTeacher
from tests.telling import telling
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MEASURED_S", 0.05)


def prepared_with(folder: Path, pair: Pair, **targets) -> Prepared:
    return prepare_run(plain(load(write_job(folder, pair, targets=targets), [])))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_pair) -> Prepared:
    return prepared_with(tmp_path_factory.mktemp("selftest"), tiny_pair, selector="top_k")


def test_the_command_says_a_line_for_each_check_and_leaves_nothing(
    ray_cluster, tmp_path, tiny_pair, capsys
):
    from teacher_service.service.service import list_services

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


@pytest.mark.drill
def test_every_teacher_is_examined_on_its_own_domains(ray_cluster, tmp_path, tiny_pair, capsys):
    job = write_job(tmp_path, tiny_pair, **two_teachers(tiny_pair))
    assert main(["selftest", str(job), "targets.top_k=32"]) == 0
    _, one, two = re.split(r"^teacher ", capsys.readouterr().out, flags=re.MULTILINE)
    for name, domain, said in (("one", "letters", one), ("two", "numbers", two)):
        assert said.startswith(f"{name} ")
        assert [line[8:28].strip() for line in said.splitlines() if line[:3] == "ok "] == [*JUDGED]
        assert f"{domain}/0" in said
        assert f"teachers.{name}.replicas=" in said


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


@pytest.mark.parametrize("selector", telling(["threshold", "sampled"], "threshold"))
def test_ids_that_are_drawn_pass(tmp_path, tiny_pair, selector: str):
    drawn = drawn_subject(tmp_path, tiny_pair, selector)
    assert drawn.question.ask.selector == selector
    found = [checks.remote_equals_local(drawn), *checks.same_model(drawn)]
    found += checks.own_student(drawn)
    assert all(verdicts(found).values()), found
    assert "from drawn ids" in by_name(found)["student := teacher"].said


@pytest.mark.parametrize("selector", telling(["threshold", "sampled"], "sampled"))
def test_ids_drawn_beside_the_teachers_probability_fail(
    tmp_path, tiny_pair, monkeypatch, selector: str
):
    found_in = drawing._found_in

    def beside(*parts: torch.Tensor) -> torch.Tensor:
        return (found_in(*parts) + 1) % 512

    monkeypatch.setattr(drawing, "_found_in", beside)
    found = checks.same_model(drawn_subject(tmp_path, tiny_pair, selector))
    assert not by_name(found)["student := teacher"].ok


def test_a_teacher_that_no_student_can_be_is_not_called_ok(prepared):
    found = subject(prepared)
    ((name, teacher),) = found.config.teachers.items()
    teachers = {name: teacher.model_copy(update={"quantisation": "int8"})}
    config = found.config.model_copy(update={"teachers": teachers})
    told = {**(found.plan.teacher or {}), "quantisation": "int8"}
    quantised = replace(found, plan=replace(found.plan, config=config, teacher=told))
    assert by_name(checks.same_model(quantised))["student := teacher"].ok is None


def shifted(arrays: Given) -> Given:
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
    def nudged(arrays: Given) -> Given:
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
        other = dict(zip(terms, reversed(terms.values()), strict=True))
        return token_losses(*arguments, terms=other, **options)

    token_losses = checks.token_losses
    assert checks.direction().ok
    monkeypatch.setattr(checks, "token_losses", swapped)
    assert not checks.direction().ok


def test_an_answer_that_holds_nothing_of_the_teachers_mass_fails(prepared):
    def emptied(arrays: Given) -> Given:
        return replace(arrays, log_tail_NS=np.zeros_like(arrays.log_tail_NS))

    assert checks.payload(subject(prepared)).ok
    assert not checks.payload(subject(prepared, emptied)).ok


def test_drawn_ids_whose_weights_do_not_sum_to_one_fail(tmp_path, tiny_pair, monkeypatch):
    drawn = drawn_subject(tmp_path, tiny_pair, "threshold")
    assert checks.payload(drawn).ok
    log_weights = drawn_ids.log_weights
    monkeypatch.setattr(drawn_ids, "log_weights", lambda *parts: log_weights(*parts) + 0.01)
    assert not checks.payload(drawn).ok


def test_a_check_that_fails_is_named_in_a_sentence_with_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "_examined", lambda *pair, **how: ["payload"])
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


def test_no_text_is_filled_for_an_examination(tmp_path, tiny_pair):
    filled = load(write_job(tmp_path, tiny_pair), ["augmentation={share: 0.5, mask: 0.2}"])
    assert filled.augmentation.mask
    assert not plain(filled).augmentation.mask


def test_a_config_of_hard_labels_alone_is_examined_with_forward_kl(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair, losses=[{"kind": "cross_entropy"}])
    assert [loss.kind for loss in plain(load(job, [])).losses] == ["cross_entropy", "forward_kl"]


@pytest.mark.parametrize("kind", telling(["forward_kl", "atkd"], "atkd"))
def test_states_are_examined_as_ids_are(tmp_path, tiny_pair, kind: str):
    """The payload is the last state of 48 numbers of 4 bytes, and the label."""
    job = write_job(tmp_path, tiny_pair, losses=[{"kind": kind}], targets={"exact": "last_hidden"})
    prepared = prepare_run(plain(load(job, [])))
    engine = HFEngine.load(prepared.teacher.model)
    engine.cache = prepared.config.paths.cache
    head = engine.ship_head()
    plan = run_plan(prepared, run_dir=Path(), teacher=engine.fingerprint, head=head)
    assert plan.training_question == question_of(
        0, 512, head=head.digest, states=head.states, states_width=head.states_width
    )
    found = subject_of(plan, lambda rank: LocalTeacher(engine))
    assert all(verdicts([*checks.same_model(found), *checks.own_student(found)]).values())
    assert checks.payload(found).said.startswith("196 bytes per token; the last state and a head")


def test_a_pair_whose_student_names_ids_is_looked_at_without_its_naming(tmp_path, tiny_pair):
    targets = {"student_ids": 8, "top_k": 24}
    job = write_job(tmp_path, tiny_pair, targets=targets, losses=[{"kind": "reverse_kl"}])
    looked_at = subject(prepare_run(plain(load(job, []))))
    assert looked_at.question.ask.num_ids == 32
    assert checks.payload(looked_at).ok
