"""What a command says of a config before anything starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planning.notes import (
    idle_policy_note,
    notes,
    router_balance_note,
    trust_note,
    weights_note,
)
from cluster.planning.preparation import check, prepare_run, refuse_unasked
from cluster.planning.revisions import revision_notes
from shared.config.file import load_config
from shared.data.trust import Trust
from shared.errors import ConfigError, DataError, HandshakeError
from student_trainer.models import student
from tests import tiny
from tests.cluster.jobs import write_job
from tests.families.making import save_family
from tests.student_trainer.losses.auxiliary.test_router_balance import mixture


@pytest.mark.parametrize(
    ("steps", "mixture", "idle"),
    [
        (6, {"policy": "ddk", "interval": 2, "lag_steps": 1}, False),
        (4, {"policy": "ddk", "interval": 2, "lag_steps": 1}, False),
        (3, {"policy": "ddk", "interval": 2, "lag_steps": 1}, True),
        (300, {"policy": "ddk"}, True),
        (6, {"policy": "fixed"}, False),
    ],
)
def test_a_policy_that_cannot_act_within_the_run_is_said(tmp_path, tiny_pair, steps, mixture, idle):
    config = load_config(write_job(tmp_path, tiny_pair, steps=steps, mixture=mixture))
    note = idle_policy_note(config)
    assert (note is not None) == idle
    if note:
        assert f"the run has {steps}" in note
        assert "lower mixture.interval" in note


def test_a_student_that_does_not_pack_is_said():
    assert trust_note(Trust(packed=True)) is None
    note = trust_note(Trust(packed=False))
    assert note is not None
    assert "it reads every document on a line of its own" in note


@pytest.mark.parametrize("policy", ["doremi", "odm"])
def test_a_policy_on_training_text_needs_a_loss_that_asks_the_teacher(tmp_path, tiny_pair, policy):
    job = write_job(tmp_path, tiny_pair, mixture={"policy": policy})
    refuse_unasked(load_config(job))
    hard = load_config(job, ["losses=[{kind: cross_entropy}]"])  # as its baseline's is read again
    with pytest.raises(ConfigError, match=rf"mixture.policy is {policy}, .* no loss asks"):
        refuse_unasked(hard)


def test_what_a_teacher_would_be_shown_by_row_needs_one_that_is_asked(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair)
    shown = ["domains.letters.columns={teacher_prompt: hint}"]
    refuse_unasked(load_config(job, shown))
    hard = [*shown, "losses=[{kind: cross_entropy}]"]
    refuse_unasked(load_config(job, [*hard, "source={teacher: 1.0, max_new_tokens: 8}"]))
    with pytest.raises(ConfigError, match=r"letters.columns has a teacher_prompt, but no loss"):
        refuse_unasked(load_config(job, hard))


def test_more_ids_than_both_models_share_are_refused(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair, losses=[{"kind": "reverse_kl"}])
    check(load_config(job, ["targets.top_k=500", "targets.student_ids=12"]))
    with pytest.raises(ConfigError, match=r"student_ids 13, 513 ids in all, .* share 512; lower"):
        check(load_config(job, ["targets.top_k=500", "targets.student_ids=13"]))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"letters": 2.0, "numbers": 1.0}, "sum to 3 and are taken as shares: letters 0.667"),
        ({"letters": 0.25, "numbers": 0.75}, None),
        ({"letters": 1.0, "numbers": 0.0}, "numbers is never drawn"),
    ],
)
def test_fixed_weights_that_are_no_shares_are_said_to_be_taken_as_such(
    tmp_path, tiny_pair, weights, said
):
    mixture = {"policy": "fixed", "weights": weights}
    note = weights_note(load_config(write_job(tmp_path, tiny_pair, mixture=mixture)))
    assert (said in note) if said else note is None


CHATS = {
    "one": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
    "two": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.fixture
def differing(tmp_path, tiny_pair):
    """A pair whose chat templates differ; the student has both, by name."""
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_pair.teacher, teacher)
    (teacher / "chat_template.jinja").write_text(CHATS["one"])
    (student / "additional_chat_templates").mkdir()
    for name, template in CHATS.items():
        (student / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    (student / "chat_template.jinja").write_text(CHATS["two"])
    return replace(tiny_pair, teacher=teacher, student=student)


def rows_of_both_kinds(folder: Path) -> dict[str, str | list[str]]:
    text, pair = {"text": "A licence."}, {"prompt": "p", "response": "r"}
    lines = [json.dumps(row) + "\n" for row in (text, pair)]
    (folder / "mixed").mkdir()
    (folder / "mixed" / "b.jsonl").write_text(lines[1])
    (folder / "mixed" / "a.txt").write_text("plain")
    (folder / "textfirst.jsonl").write_text(lines[0] + lines[1])
    (folder / "text.jsonl").write_text(lines[0])
    return {
        "a later row": "textfirst.jsonl",
        "a later file": "mixed",
        "a later source": ["text.jsonl", "textfirst.jsonl"],
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_templates_are_compared_where_any_row_passes_through_one(tmp_path, differing, split):
    job = write_job(tmp_path, differing)
    sources = rows_of_both_kinds(tmp_path)
    check(load_config(job, [f"domains.letters.{split}=text.jsonl"]))
    for source in sources.values():
        config = load_config(job, [f"domains.letters.{split}={json.dumps(source)}"])
        with pytest.raises(HandshakeError, match="have different chat templates"):
            check(config)
        check(load_config(job, [f"domains.letters.{split}={json.dumps(source)}", ONE]))


ONE = "data.chat_template=one"


def test_the_named_template_is_the_one_that_rows_pass_through(tmp_path, differing):
    hands = check(load_config(write_job(tmp_path, differing), [ONE]))
    assert hands.load_tokenizer().chat_template == CHATS["one"]
    with pytest.raises(DataError, match=r"'three', but the templates of .* are: .*one"):
        check(load_config(tmp_path / "job.yaml", ["data.chat_template=three"]))


def test_a_mixture_whose_config_asks_for_its_routers_loss_learns_it(tmp_path, tiny_pair):
    folder = tmp_path / "mixture"
    tiny.save_tokenizer(folder)
    mixture("mixtral").save_pretrained(folder)
    job = write_job(tmp_path, tiny_pair, student={"model": str(folder)})
    config = prepare_run(load_config(job)).config
    assert [(loss.kind, loss.weight) for loss in config.losses][-1] == ("router_balance", 0.5)
    assert "router_balance 0.5" in router_balance_note(config)
    left_out = ["losses=[{kind: forward_kl}, {kind: router_balance, weight: 0}]"]
    config = prepare_run(load_config(job, left_out)).config
    assert [loss.weight for loss in config.losses] == [1, 0]
    assert router_balance_note(config) is None


def test_a_loss_of_its_routers_that_transformers_lacks_is_left_out_and_said(
    tmp_path, tiny_pair, monkeypatch
):
    """But not where losses ask for it, where the start is refused."""
    folder = save_family("llama4_text", tmp_path / "mixture", seed=1)
    tiny.edit_config(folder, output_router_logits=True)
    job = write_job(tmp_path, tiny_pair, student={"model": str(folder)})
    prepared = prepare_run(load_config(job))
    assert [loss.kind for loss in prepared.config.losses] == ["forward_kl"]
    (said,) = (note for note in notes(prepared) if "routers" in note)
    assert said.endswith(f"is left out: transformers has no loss of the routers of {folder}.")
    with monkeypatch.context() as patch:
        patch.setattr(student, "load_model", None)
        assert prepare_run(load_config(job)).left_out in said, "nothing is loaded again"
    asked = "losses=[{kind: forward_kl}, {kind: router_balance, experts_per_token: 2}]"
    with pytest.raises(ConfigError, match="take router_balance out of losses"):
        prepare_run(load_config(job, [asked]))


def test_a_revision_of_what_has_none_is_said(tmp_path, tiny_pair):
    job = write_job(tmp_path, tiny_pair)
    folder = {"dataset": str(tmp_path), "revision": "v2"}
    asked = ["student.revision=v1", f"domains.letters.validation={json.dumps(folder)}"]
    assert list(revision_notes(load_config(job))) == []
    found = list(revision_notes(load_config(job, asked)))
    assert found == [
        f"{option} lies on this machine and has no revisions: it is read as it is"
        for option in (
            f"student.revision is v1, but {tiny_pair.student}",
            f"domains.letters.validation.revision is v2, but {tmp_path}",
        )
    ]
    elsewhere = ["student.model=some/model", "student.revision=v1"]
    assert list(revision_notes(load_config(job, elsewhere))) == []
