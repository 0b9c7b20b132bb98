"""A run in stages by a user's commands: a dense student, and what it is as a mixture of experts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.cli import main
from cluster.launch.staging import stages_of
from shared.config.file import dump, load_config, resolve
from shared.run.run_dir import RunDir
from tests.cluster.jobs import write_job
from tests.student_trainer.models.test_upcycling import EXPERTS, ROUTER

STAGES = {
    "dense": {},
    "sparse": {
        "student.upcycle": {"every": 1, "experts": 2, "top_k": 1},
        "steps": 2,
        "optimiser.lr": 1e-3,
    },
}


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory, tiny_pair) -> Path:
    """A config whose stages have run."""
    parts = {"steps": 3, "mixture": {"policy": "fixed"}, "stages": STAGES}
    found = write_job(tmp_path_factory.mktemp("job"), tiny_pair, **parts)
    assert main(["run", str(found)]) == 0
    return found


@pytest.fixture
def whole(job) -> RunDir:
    """The run's folder, which is its last stage's."""
    return RunDir(job.parent / "runs" / "job")


@pytest.fixture
def first(whole) -> RunDir:
    return RunDir(whole.stages / "job-dense")


def evaluation(run_dir: RunDir, when: str) -> dict[str, dict[str, float]]:
    return json.loads((run_dir.path / "evaluations.json").read_text())[when]


def test_a_stage_begins_with_what_the_one_before_it_ended_with(whole, first):
    ended, begun = evaluation(first, "after"), evaluation(whole, "before")
    for name, domain in ended.items():
        assert begun[name]["student_nll"] == pytest.approx(domain["student_nll"], rel=1e-6)
        assert domain["kl"] < evaluation(first, "before")[name]["kl"]


def test_a_teacher_that_follows_the_student_is_in_each_stage_what_the_student_is(
    tmp_path, tiny_pair
):
    teacher = {"model": str(tiny_pair.student), "follow_student": {"lag": 2}}
    mixture = {"policy": "fixed"}
    parts = {"teachers": {"own": teacher}, "stages": STAGES, "mixture": mixture}
    config = resolve(load_config(write_job(tmp_path, tiny_pair, **parts)))
    first, second = (stage.config for stage in stages_of(config))
    assert first.teachers["own"].model == first.student.model == str(tiny_pair.student)
    export = tmp_path / "runs" / "job" / "stages" / "job-dense" / "export"
    assert second.teachers["own"].model == second.student.model == str(export)
    again = tmp_path / "again.yaml"
    again.write_text(dump(second))
    assert load_config(again) == second


def test_what_a_stage_trains_is_what_moves(whole, first):
    """In the second one experts and routers alone; transformers loads what both leave."""
    dense, sparse = (
        dict(AutoModelForCausalLM.from_pretrained(one.export).named_parameters())
        for one in (first, whole)
    )
    for name in sparse.keys() & dense.keys():
        assert torch.equal(sparse[name], dense[name]), name
    added = sparse.keys() - dense.keys()
    assert added
    assert all(EXPERTS.fullmatch(name) or ROUTER.fullmatch(name) for name in added)
    experts = sparse["model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_each_stage_is_a_run_that_commands_find(whole, first, capsys):
    assert main(["status", str(whole.path)]) == 0
    assert main(["status", str(first.path)]) == 0
    assert main(["report", str(first.path)]) == 0
    assert json.loads(first.summary.read_text())["steps"] == 3
    assert json.loads(whole.summary.read_text())["steps"] == 2
    card = (whole.export / "README.md").read_text()
    assert "job-dense, upcycled to 2 experts in every layer, 1 a token, taught by" in card


def test_the_same_command_changes_nothing(job, whole, first, capsys):
    files = [path for one in (whole, first) for path in one.export.iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert main(["run", str(job)]) == 0
    said = capsys.readouterr().out
    assert "stage dense, 1 of 2\n" in said
    assert "job-dense is finished" in said
    assert "job is finished" in said
    assert before == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["stages.dense.optimiser.lr=1e-4"], "'job-dense' was started with other values of optim"),
        (["stages.dense.steps=5"], "stage dense has not taken its 5 steps, and stage sparse began"),
        (
            ["stages.last={}"],
            "begun with the stages dense, sparse, now they are dense, sparse, last",
        ),
        (["stages={}"], "holds a run in stages, which this config has not"),
        (["stages.sparse.seed=9"], "'job' was started with other values of seed"),
    ],
)
def test_what_would_undo_a_stage_is_refused(job, whole, options, said, capsys):
    before = load_file(whole.export / "model.safetensors")
    assert main(["run", str(job), *options]) == 2
    assert said in capsys.readouterr().err
    after = load_file(whole.export / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["stages.sparse.domains={math: {train: nowhere.jsonl}}"], "nowhere.jsonl does not exist"),
        (["stages.sparse.optimiser.warmup_steps=9"], "stage sparse: optimiser.warmup_steps is 9"),
        (["stages.sparse.losses=[{kind: hidden_states, layers: {1: 9}}]"], "stage sparse: "),
    ],
)
def test_a_later_stage_that_cannot_be_is_refused_before_the_first(job, options, said, capsys):
    assert main(["run", str(job), "name=other", *options]) == 2
    assert said in capsys.readouterr().err
    assert not (job.parent / "runs" / "other").exists()


def test_a_student_that_no_mixture_holds_is_refused_before_the_first_stage(job, tmp_path, capsys):
    from tests.student_trainer.models.test_upcycling import save_dense

    dense = save_dense(tmp_path / "biased", mlp_bias=True)
    asked = [f"student.model={dense}", "name=other"]
    assert main(["run", str(job), *asked]) == 2
    assert "stage sparse: student.upcycle: " in (said := capsys.readouterr().err)
    assert "has no place for" in said
    assert not (job.parent / "runs" / "other").exists()


def test_stages_of_other_classes_are_refused_before_the_first(job, capsys):
    """The head of a student that a stage exports is for the classes of its rows."""
    folder = job.parent
    for name, labels in (("first", "ab"), ("second", "ac")):
        rows = [{"text": f"{label} {n}", "label": label} for label in labels for n in range(9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "name": "other",
        "task": "classification",
        "domains": {"kinds": {"train": "first.jsonl"}},
        "losses": [{"kind": "forward_kl"}],
        "stages": {
            "one": {},
            "two": {"domains": {"kinds": {"train": "second.jsonl"}}},
        },
    }
    told = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    assert main(["run", str(job), *told]) == 2
    said = capsys.readouterr().err
    assert "stage two has other classes than stage one: its rows and those do not both have b" in (
        said
    )
    assert not (folder / "runs" / "other").exists()
    assert main(["run", str(job), *told, "name=job", "--fresh"]) == 2
    assert not list((folder / "runs").glob("job.old*"))


def test_commands_that_look_at_one_run_say_so(job, capsys):
    for command in ("plan", "capture"):
        assert main([command, str(job)]) == 2
        assert "the config has the stages dense, sparse, which" in capsys.readouterr().err
