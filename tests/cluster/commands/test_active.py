"""`tutelage active` on tiny models, and what it refuses."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import api
from cluster.active.asking import Log
from cluster.active.filtering import plain
from cluster.active.folder import ActiveDir, read_json, read_lines
from cluster.cli import main
from cluster.prompt_search.teacher import ROOM, answer_in
from shared.config.file import dump
from shared.errors import ConfigError
from tests.cluster.active.scripted import (
    ACTIVE,
    Rounds,
    active_job,
    config_of,
    line,
    material_for,
    write_rows,
)
from tests.cluster.active.test_elad import ELAD
from tests.cluster.active.writing_teacher import save_writing_teacher
from tests.tiny import edit_config

KEPT, ODD = ("the frog number 7000", "green"), ("old ink", "mauve")
SMALL = {
    "active.prompts": 1,
    "active.shots": 1,
    "active.correct": 0,
    "active.hard_negatives": 1,
    "active.report_classes": 1,
    "active.temperature": 0,
    "active.max_new_tokens": 120,
    "active.train_prompts": 20,
}


@pytest.fixture
def job(tmp_path, tiny_pair, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return active_job(tmp_path, tiny_pair)


@pytest.mark.drill
def test_rounds_of_real_models_write_train_and_end(ray_cluster, job, tiny_pair, tmp_path, capsys):
    alike = Rounds(config_of(job, *spelt(SMALL | {"paths.runs": "alike"})))
    alike.teach()
    prompts, answer = [ask.text for ask in alike.writer.asked], f"{line(*KEPT)}\n{line(*ODD)}"
    teacher = save_writing_teacher(tmp_path / "writes", tiny_pair, prompts, answer)
    asked = SMALL | {"teachers.tiny.model": str(teacher), "active.rounds": 1}
    folder = ActiveDir(api.active(job, asked))
    said = capsys.readouterr().out
    assert (
        "round 0: the teacher answered 1 of 1 prompt, 1 rows kept; 1 left out: unknown class 1"
        in said
    )
    assert "The teacher has written in 1 rounds (active.rounds)." in said
    (row,) = read_lines(folder.round(0).rows)
    assert (row["prompt"], row["response"]) == KEPT
    told = read_json(folder.rounds)
    assert [one["kept"] for one in told["rounds"]] == [1, 0]
    assert told["rounds"][0]["left_out"] == {"unknown class": 1}
    (asked_once,) = Log(folder.asked).told()
    assert told["tokens"] == asked_once.answer.read + asked_once.answer.written
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ids = tokenizer(f"{asked_once.ask.text}\n", add_special_tokens=False)["input_ids"]
    assert asked_once.answer.read == 1 + len(ids)
    wrote = tokenizer(asked_once.answer.text, add_special_tokens=False)["input_ids"]
    assert asked_once.answer.written == len(wrote) + 1, "its end among them"
    assert "the frog number 7000 → green" in folder.report.read_text()
    says_what_its_export_does(job, folder, told["best"])

    assert main(["active", str(job), *spelt(asked | {"active.rounds": 2})]) == 2
    error = capsys.readouterr().err.strip()
    assert "wrote in round 1 is learnt (written before 1, unknown class 1)" in error
    assert "\n" not in error
    assert len(Log(folder.asked).told()) == 2
    assert (folder.export / "model.safetensors").exists()


def test_a_real_student_is_as_sure_of_its_explanations_as_its_draws_are_alike(
    ray_cluster, job, tiny_pair, tmp_path, capsys
):
    teacher = shutil.copytree(tiny_pair.teacher, tmp_path / "reads")
    edit_config(teacher, max_position_embeddings=1024)
    asked = {"teachers.tiny.model": str(teacher), "active": ELAD, "active.answer_marker": "a"}
    asked |= {"active.train_prompts": 3, "active.validation_prompts": 3, "active.patience": 1}
    folder = ActiveDir(api.active(job, asked | {"active.sample_temperature": 0}))
    assert "The student is sure of every explanation" in capsys.readouterr().out
    chains = read_json(folder.round(0).answers)["chains"]
    assert [(one["within"], one["between"]) for one in chains] == [(0, 0)] * 3
    folder.round(0).answers.unlink()
    drawn = {"active.sample_temperature": 2.0, "active.samples": 2}
    with pytest.raises(ConfigError, match=r"wrote in round 0 is learnt \(malformed \d\)"):
        api.active(job, asked | drawn)
    chains = read_json(folder.round(0).answers)["chains"]
    assert {one["between"] for one in chains} <= {0, 1}, "of two draws"
    assert all(0 <= one["within"] <= 1 / 2 for one in chains)
    assert any(one["within"] > 0 for one in chains)
    assert {told.ask.purpose for told in Log(folder.asked).told()} == {"verify"}


def spelt(options: Mapping[str, object]) -> list[str]:
    """Options as on the command line."""
    return [f"{name}={value}" for name, value in options.items()]


def says_what_its_export_does(job: Path, folder: ActiveDir, number: int) -> None:
    """The export of the best round is its student, whose answers and confidence are on record."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder.export).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.export)
    items = material_for(config_of(job)).validation_items()
    answers = read_json(folder.round(number).answers)["validation"]
    assert len(answers) == len(items) == ACTIVE["validation_prompts"]
    room = max(item.num_right for item in items) + ROOM
    for item, answer in zip(items[:4], answers[:4], strict=True):
        assert answer["key"] == item.key
        opening = torch.tensor(item.ids[: item.num_opening], dtype=torch.int64)[None]
        asked = {"max_new_tokens": room, "do_sample": False, "return_dict_in_generate": True}
        with torch.no_grad():
            out = model.generate(opening, output_scores=True, **asked)
        written = out.sequences[0, item.num_opening :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert answer["text"] == plain(answer_in(text, answer["right"], chat=False))
        logprobs = torch.cat([score.log_softmax(-1) for score in out.scores])
        whole = logprobs.gather(1, written[:, None]).sum().exp()
        assert answer["probability"] == pytest.approx(float(whole), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["active=null"], "the config has no section `active`"),
        (["active.domain=odd"], "active.domain is odd, which is none of the domains colours"),
        (["active.budget_tokens=60"], "active.budget_tokens is 60, of which one answer may take"),
        (["domains.more.train=letters.jsonl"], "active.domain is not set, and there are several"),
        (["domains.colours.validation=null"], "domains.colours names no validation text"),
        (["domains.colours.train=letters.jsonl"], "has no rows of prompt and response"),
        (["domains.colours.validation=letters.jsonl"], "has no rows of prompt and response"),
        (["active.max_classes=2"], "has 3 different responses, more than active.max_classes 2"),
        (["domains.colours.train=one.jsonl"], "every row of domain colours has the response 'a'"),
        (["domains.colours.train=held.jsonl"], "stands in its validation text, too; split it"),
        (
            ["domains.colours.train=long.jsonl"],
            "has no prompt whose response fits data.context 64",
        ),
        (["active.correct=-1"], "active.correct is -1"),
        (["active.method=odd"], "active.method is 'odd'"),
        (["active.samples=3"], "active.samples is not an option"),
        (
            ["targets.store=store", "targets.teacher_free=true"],
            "leaves no teacher that could write",
        ),
        (
            ["teachers.tiny={model: m, engine: vllm, python: /p}", "active.temperature=0.001"],
            "but active.temperature is 0.001",
        ),
        ([f"name={'n' * 190}"], "name has 190 characters, and rounds are named after it"),
        (["task=classification"], "task is classification, but rounds are of a student that"),
        (["teachers.tiny.online_modules={}"], "rounds share a teacher"),
    ],
)
def test_bad_input_is_a_sentence_before_anything_starts(
    job, tmp_path, overrides, said, capsys, monkeypatch
):
    write_rows(tmp_path / "one.jsonl", [{"prompt": f"p {n}", "response": "a"} for n in range(4)])
    long = [{"prompt": "p " * 300 + str(n), "response": f"a {n % 2}"} for n in range(4)]
    write_rows(tmp_path / "long.jsonl", long)
    monkeypatch.setattr("cluster.session.session.connected", None)
    assert main(["active", str(job), *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not list((tmp_path / "runs").glob("*/rounds"))


def test_rounds_and_runs_of_one_name_and_rounds_of_other_options_are_kept_apart(
    job, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cluster.session.session.connected", None)
    folder = tmp_path / "runs" / "rounds"
    folder.mkdir(parents=True)

    def refused() -> str:
        return capsys.readouterr().err.strip()

    (folder / "config.yaml").write_text(dump(config_of(job)))
    assert main(["active", str(job)]) == 2
    assert "rounds is a run of its own; give the rounds another name" in refused()
    (folder / "config.yaml").rename(folder / "active.yaml")
    assert main(["run", str(job)]) == 2
    assert "holds rounds of `tutelage active`; give this run another name" in refused()
    assert main(["active", str(job), "optimiser.lr=1"]) == 2
    assert "were started with other values of optimiser.lr (0.003, now 1.0)" in refused()
    assert main(["active", str(job), "active.domain=colours"]) == 2
    assert "active.domain (null, now colours)" in refused()
    (folder / "active.yaml").write_text(dump(config_of(job)))
    (folder / "text.json").write_text('{"train": "other"}')
    assert main(["active", str(job)]) == 2
    assert "domains.colours.train has other rows than when the rounds began" in refused()
