"""Tasks of lm-evaluation-harness on local data, from folders of models and of runs."""

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import api
from cluster.cli import main
from cluster.evaluation import harness
from cluster.evaluation.statistics import Estimate
from shared.config.file import dump, load_config, resolve
from shared.errors import ConfigError
from tests.cluster.jobs import write_job

WORDS = (" one", " two", " class", " self", " return", " the", " of", " name")
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the extra `eval` is not installed"
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task on a file of 40 questions, each with two words to choose from."""
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(1)
    rows = [
        {"question": f"say {n} of {n * n}:", "answer": n % 2, "choices": draw.sample(WORDS, 2)}
        for n in range(40)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(told))
    return folder / "sums.yaml"


@pytest.fixture
def run(tmp_path: Path, tiny_pair) -> Path:
    """A run's folder whose export is a student of its own."""
    job = write_job(tmp_path, tiny_pair)
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(resolve(load_config(job, ["name=mine"]))))
    shutil.copytree(tiny_pair.student, run / "export")
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(run / "export")
    facts = {"run": "mine", "step": 6, "checkpoint": "step-6", "files": {}}
    (run / "export" / "tutelage.json").write_text(json.dumps(facts))
    return run


@torch.no_grad()
def accuracy(folder: Path, task: Path, *, limit: int = 40) -> float:
    """The share of questions whose right choice is the likelier, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (task.parent / "sums.jsonl").open()][:limit]
    right = 0
    for row in rows:
        totals = []
        for choice in row["choices"]:
            opening = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, ids[0, 1:, None])[len(opening) - 1 :]
            totals.append(float(own.sum()))
        right += totals.index(max(totals)) == row["answer"]
    return right / len(rows)


@needs_harness
def test_a_run_is_measured_on_its_export_and_others_where_asked(run, task, tiny_pair, capsys):
    assert main(["eval", str(run), "--task", str(task)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sums")]
    found = json.loads((run / "tasks.json").read_text())
    after = found["tasks"]["sums"]["acc"]["after"]
    assert after["value"] == pytest.approx(accuracy(run / "export", task))
    assert line.split() == ["sums", "acc", f"{after['value']:.3f}", "±", f"{after['error']:.3f}"]
    results = api.Run(run).evaluate_tasks([str(task)], also=["teacher", "before"], limit=30)
    assert results.limit == 30
    folders = {"teacher": tiny_pair.teacher, "before": tiny_pair.student, "after": run / "export"}
    assert list(results.tasks["sums"]["acc"]) == list(folders)
    for name, folder in folders.items():
        own = results.tasks["sums"]["acc"][name].value
        assert own == pytest.approx(accuracy(folder, task, limit=30))
    values = [estimate.value for estimate in results.tasks["sums"]["acc"].values()]
    assert len(set(values)) == len(values)  # so that each was measured by itself
    assert "At most 30 examples" in results.table()
    assert max(map(len, results.table().splitlines())) <= 100


@needs_harness
def test_a_folder_of_adapters_is_measured_on_its_base(task, tmp_path, tiny_pair, capsys) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tiny_pair.student, tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert main(["eval", str(tmp_path / "adapter"), "--task", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["sums"]["acc"]["model"]["value"]
    assert found == pytest.approx(accuracy(tmp_path / "merged", task))
    assert found != pytest.approx(accuracy(tiny_pair.student, task))
    assert not (tmp_path / "adapter" / "tasks.json").exists()


@needs_harness
def test_a_task_without_its_data_is_refused(run, task, tmp_path, capsys) -> None:
    told = yaml.safe_load(task.read_text())
    told["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(told))
    assert main(["eval", str(run), "--task", str(tmp_path / "bad.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.yaml cannot be set up; is its data there, or the network? (" in said
    assert not (run / "tasks.json").exists()


@needs_harness
def test_a_file_that_is_not_there_is_refused(run, capsys) -> None:
    assert main(["eval", str(run), "--task", "gone.yaml"]) == 2
    assert "gone.yaml, a file that is not there" in capsys.readouterr().err


def test_a_name_that_is_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'helaswag', which is no .* \(did you mean hellaswag\?"):
        harness._refuse_unknown("helaswag", ["arc_easy", "hellaswag"], "0.4")


def test_without_the_extra_it_is_named(run, task, monkeypatch, capsys) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_harness")
    assert main(["eval", str(run), "--task", str(task)]) == 2
    assert "pip install 'tutelage[eval]'" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(run, task, tiny_pair, capsys) -> None:
    asked = {
        ("eval", str(run), "--task", str(task), "--also", "after"): "it is one of teacher and",
        ("eval", str(run), "--also", "teacher"): "name one with --task",
        ("eval", str(run), "--limit", "3"): "name one with --task",
        ("eval", str(run), "--task", str(task), "--compare", "x"): "not for --task",
        ("eval", str(tiny_pair.student)): "holds a model and no run",
        ("eval", str(tiny_pair.student), "--task", "x", "--also", "before"): "is of a run, and",
    }
    for arguments, sentence in asked.items():
        assert main(list(arguments)) == 2
        assert sentence in capsys.readouterr().err
    shutil.rmtree(run / "export")
    assert main(["eval", str(run), "--task", str(task)]) == 2
    assert "neither a checkpoint nor an export" in capsys.readouterr().err


def test_metrics_are_named_by_their_filters_and_numbers_alone_are_kept() -> None:
    told = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
        "word_perplexity,none": float("inf"),
    }
    assert harness._estimates(told) == {
        "acc": Estimate(0.5, 0.1),
        "exact_match, strict": Estimate(0.25, None),
    }
