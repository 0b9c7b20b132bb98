"""Every verb under every task works, in the tests that are named, or is refused in one sentence."""

import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from transformers import AutoModelForTokenClassification

from cluster.cli import app, main
from shared.config.file import dump
from shared.config.run import Config
from shared.config.tasks.task import (
    Classification,
    ImageText,
    LanguageModel,
    Marking,
    Tagging,
    Task,
)
from tests import pictured
from tests.cluster.jobs import write_job
from tests.student_trainer.tasks import classified, tagged
from tests.tiny import Pair

ROOT = Path(__file__).parents[3]
LANGUAGE, CLASSES, IMAGES, TAGS, MARKS = (
    kind.model_fields["kind"].default
    for kind in (LanguageModel, Classification, ImageText, Tagging, Marking)
)
# Of machines, files and clusters, whatever a task is.
OF_NO_TASK = {"jobs", "manifests", "cache", "doctor", "init", "monitor", "recipes", "status"}
SAME = {"train": "run", "submit": "run", "report": "run", "export": "run"}
TEXTS = {
    "run": "tests/cluster/launch/test_driver.py",
    "capture": "tests/cluster/launch/test_capture.py",
    "teacher": "tests/cluster/test_cli.py",
    "eval": "tests/cluster/evaluation/test_eval.py",
    "eval --task": "tests/cluster/evaluation/test_harness.py",
    "plan": "tests/cluster/commands/test_plan.py",
    "plan --probe": "tests/cluster/probing/test_probe.py",
    "selftest": "tests/cluster/selftest/test_selftest.py",
    "prompts": "tests/cluster/commands/test_prompts.py",
    "active": "tests/cluster/commands/test_active.py",
}
LAUNCH = "tests/cluster/launch"
HERE = "tests/cluster/commands/test_verbs_of_tasks.py"
# Where it works, or what is said where it does not.
OTHERS = {
    "run": {t: f"{LAUNCH}/test_{t}.py" for t in (CLASSES, IMAGES)},
    "capture": {t: f"{LAUNCH}/test_{t}.py" for t in (CLASSES, IMAGES)},
    "teacher": {t: f"{LAUNCH}/test_{t}.py" for t in (CLASSES, IMAGES)},
    "eval": {t: f"{LAUNCH}/test_{t}.py" for t in (CLASSES, IMAGES)},
    "eval --task": {
        CLASSES: "`tutelage eval --task` is of language models; without --task",
        IMAGES: "`tutelage eval --task` reads text alone; without --task",
    },
    "plan": {CLASSES: HERE, IMAGES: HERE},
    "plan --probe": {
        CLASSES: "--probe is of language models; plan without it",
        IMAGES: f"{LAUNCH}/test_{IMAGES}.py",
    },
    "selftest": {
        CLASSES: "selftest is of language models; run with steps=10",
        IMAGES: "selftest reads text alone; run with steps=10",
    },
    "prompts": {
        CLASSES: "a search for prompts is of language models; write task.template",
        IMAGES: "a search for prompts reads text alone; leave prompts out",
    },
    "active": {
        CLASSES: "rounds are of a student that writes its answers; leave task out",
        IMAGES: "active is set, whose teachers write text alone; leave it out",
    },
}
TASKS = (CLASSES, IMAGES, TAGS, MARKS)
IN_TASKS = "tests/student_trainer/tasks"
NO_ENTITIES = {
    "eval --task": "`tutelage eval --task` knows no entities; summary.json",
    "selftest": "selftest knows no entities; run with steps=10",
    "prompts": "a search for prompts knows no entities; write task.template",
}
for entities in (TAGS, MARKS):
    OTHERS["run"][entities] = f"{IN_TASKS}/test_{entities}.py"
    for verb in ("capture", "eval"):
        OTHERS[verb][entities] = f"{LAUNCH}/test_{TAGS}.py"
    OTHERS["teacher"][entities] = TEXTS["teacher"]  # whose rows are in the same stores
    for refused, sentence in NO_ENTITIES.items():
        OTHERS[refused][entities] = sentence
OTHERS["plan"] |= dict.fromkeys((TAGS, MARKS), HERE)
OTHERS["plan --probe"] |= {TAGS: OTHERS["plan --probe"][CLASSES], MARKS: HERE}
OTHERS["active"][TAGS] = OTHERS["active"][CLASSES]
OTHERS["active"][MARKS] = "active is set, whose teachers write no marks; leave it out"


def is_test(found: str) -> bool:
    return found.startswith("tests/")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By task a config, and the folder of a run that has one."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "models").mkdir()
    classified.save_models(folder / "models")
    pair = pictured.save_pair(folder / "images")
    made = {
        CLASSES: classified.config_of(folder / CLASSES, "run", models=folder / "models"),
        IMAGES: pictured.config_of(folder / IMAGES, "run", pair=pair),
    }
    for entities in (TAGS, MARKS):
        task = {"task": {"kind": entities}, "student": {"zero": 1}}
        made[entities] = tagged.config_of(
            folder / entities, "run", models=folder / "models", **task
        )
    return {task: written(config, folder / task) for task, config in made.items()}


def written(config: Config, folder: Path) -> tuple[Path, Path]:
    asked = config.model_copy(
        update={"student": config.student.model_copy(update={"zero": 0, "workers": 1})}
    )
    for path in (folder / "job.yaml", folder / "run" / "config.yaml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(asked))
    return folder / "job.yaml", folder / "run"


def arguments(verb: str, job: Path, run: Path) -> list[str]:
    named = {
        "eval": ["eval", str(run)],
        "eval --task": ["eval", str(run), "--task", "any"],
        "plan --probe": ["plan", str(job), "--probe"],
        "prompts": ["prompts", "optimise", str(job)],
        "active": ["active", str(job), "active={method: pgkd}"],
    }
    return named.get(verb, [verb, str(job)])


def test_every_verb_and_task_is_known():
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(Task)[0])}
    assert kinds == {LANGUAGE, *TASKS}
    verbs = set(typer.main.get_group(app).commands)
    assert verbs == {verb.split()[0] for verb in OTHERS} | set(SAME) | OF_NO_TASK
    assert OTHERS.keys() == TEXTS.keys()
    for verb, found in OTHERS.items():
        assert set(found) == set(TASKS), verb
        for where in (TEXTS[verb], *filter(is_test, found.values())):
            assert (ROOT / where).exists(), where


REFUSED = [(v, t) for v, by_task in OTHERS.items() for t in TASKS if not is_test(by_task[t])]


@pytest.mark.parametrize(("verb", "task"), REFUSED)
def test_what_a_task_has_no_meaning_for_is_one_sentence_with_a_way_out(jobs, capsys, verb, task):
    assert main(arguments(verb, *jobs[task])) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"task is {task}, " in said
    assert OTHERS[verb][task] in said


def planned(capsys: pytest.CaptureFixture, job: Path, *overrides: str) -> dict:
    capsys.readouterr()
    assert main(["plan", str(job), *overrides, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_of_classes_counts_rows_and_what_a_teacher_says_of_each(jobs, capsys):
    job, _ = jobs[CLASSES]
    found = planned(capsys, job, "student.model=tiny")
    assert found["wire"]["bytes_per_token"]["classes"] == 4 * len(classified.LABELS)
    assert found["wire"]["tokens_per_step"] == found["config"]["batch"]["rows_per_step"]
    assert found["student"]["activations"]["traced"]
    assert found["payloads"] == []
    tiny = found["student"]["sizes"]
    assert tiny["num_weights"] == 17_472 + 65 * len(classified.LABELS)


def test_a_plan_of_images_counts_what_sees(jobs, capsys):
    job, _ = jobs[IMAGES]
    found = planned(capsys, job)
    student = found["student"]
    assert student["activations"]["traced"]
    assert student["sizes"]["trained"] == student["sizes"]["num_weights"]
    blind = planned(capsys, job, "task=language_model", "data.too_long=drop")["student"]
    assert blind["sizes"]["num_weights"] == student["sizes"]["num_weights"]
    assert blind["sizes"]["trained"] < student["sizes"]["trained"]
    assert blind["activations"]["kept_bytes"] < student["activations"]["kept_bytes"]
    assert any("which stands in 4 of its tokens" in note for note in found["notes"])


def test_a_plan_of_tags_counts_a_text_for_each_of_its_words(jobs, capsys, tmp_path):
    """Of a language model; a token classifier reads each text once."""
    job, _ = jobs[TAGS]
    found = planned(capsys, job)
    tags = len(tagged.TAGS)
    assert found["wire"]["bytes_per_token"]["classes"] == 4 * tags
    rows, tokens = found["config"]["batch"]["rows_per_step"], found["tokens"]
    assert found["wire"]["tokens_per_step"] == rows * tokens
    assert found["student"]["activations"]["traced"]
    assert found["student"]["sizes"]["vocabulary"] == tags
    (note,) = (note for note in found["notes"] if "once for each of its words" in note)
    words = float(note.partition("words, ")[2].split()[0])
    texts = [row["text"] for row in tagged.rows_of(0, count=12)]
    real = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) / len(texts)
    assert words == pytest.approx(real, abs=0.5)
    student = AutoModelForTokenClassification.from_pretrained(
        found["config"]["student"]["model"], num_labels=tags
    )
    student.save_pretrained(tmp_path)
    own = planned(capsys, job, f"teachers.t.model={tmp_path}")
    assert not any("once for each of its words" in note for note in own["notes"])
    (asked,), (told,) = found["teachers"], own["teachers"]
    lines = asked["activations"]["tokens"] / tokens
    assert lines == math.ceil(found["config"]["batch"]["micro_batch"] * real)
    assert told["activations"]["tokens"] == found["config"]["batch"]["micro_batch"] * tokens


def test_a_plan_of_marks_counts_the_moved_copy_of_a_contrast(jobs, capsys):
    job, _ = jobs[MARKS]
    model = planned(capsys, job)["config"]["teachers"]["t"]["model"]
    causal = f"student.model={model}"
    plain = planned(capsys, job, causal)
    contrast = "losses=[{kind: cross_entropy}, {kind: entity_contrast, layer: 1}]"
    found = planned(capsys, job, causal, contrast)
    own, moved = (one["student"]["activations"] for one in (plain, found))
    assert moved["kept_bytes"] == 2 * own["kept_bytes"]
    assert moved["flops"] == 3 * own["flops"]
    assert found["work"]["student"] > 2 * plain["work"]["student"]


def test_soft_labels_of_a_runs_own_rows_are_of_no_other_verb(jobs, capsys):
    job, _ = jobs[CLASSES]
    similar = "teachers.t.engine=similarity"
    for verb in (["plan"], ["teacher", "up"]):
        assert main([*verb, str(job), similar]) == 2
        assert "call `tutelage run`" in capsys.readouterr().err


def test_pairs_are_planned_for_as_their_rows(tiny_pair: Pair, tmp_path: Path, capsys):
    losses = [{"kind": "preference"}]
    data = {"context": 64, "validation_rows": 4, "too_long": "drop"}
    fixed = {"policy": "fixed"}
    job = write_job(tmp_path, tiny_pair, losses=losses, data=data, mixture=fixed)
    found = planned(capsys, job)
    assert found["wire"]["tokens_per_step"] == 4 * 64
    assert main(["active", str(job), "active={method: pgkd, domain: letters}"]) == 2
    assert "preference" in capsys.readouterr().err
