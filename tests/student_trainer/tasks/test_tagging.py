"""A tagger learns what a plain loop of transformers teaches it, and its run is like any other.

N words   C tags
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seqeval.metrics import f1_score
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer

from shared.config.run import Config
from shared.run.metrics import read_metrics
from tests.student_trainer.comparing import comparable_lines, same_weights, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import adamw, rates_of
from tests.student_trainer.processes import as_job
from tests.student_trainer.tasks import classified
from tests.student_trainer.tasks.classified import plan_of
from tests.student_trainer.tasks.tagged import TAGS, config_of
from tests.student_trainer.tasks.test_classification import OPTIMISER, trained
from tests.telling import asked, telling

LOSSES = [
    {"kind": "forward_kl", "temperature": 2.0, "weight": 0.7},
    {"kind": "cross_entropy", "weight": 0.4},
]
ALL = {"rows_per_step": 12, "micro_batch": 3}  # all rows are drawn at every step
SAID = ("none", "kind", "inside kind", "place", "inside place")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    classified.save_models(folder)
    return folder


def words_of(row: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Start, end and tag of each word, by another way than ours."""
    found = []
    for match in re.finditer(r"\w+|[^\w\s]", row["text"]):
        inside = [e for e in row["entities"] if e["start"] <= match.start() < e["end"]]
        tag = "O"
        if inside:
            tag = f"{'B' if inside[0]['start'] == match.start() else 'I'}-{inside[0]['type']}"
        found.append((*match.span(), tag))
    return found


def logits_of(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> Tensor:
    """At the first token of each word, text by text, unpadded [N, C]."""
    found = []
    for row in rows:
        encoded = tokenizer(row["text"], return_tensors="pt", return_offsets_mapping=True)
        spans = encoded.pop("offset_mapping")[0].tolist()
        logits_TC = model(**encoded).logits[0]
        for start, end, _ in words_of(row):
            at = next(n for n, (a, b) in enumerate(spans) if a < b and a < end and b > start)
            found.append(logits_TC[at])
    return torch.stack(found)


def taught(models: Path, rows: list[dict[str, Any]]) -> Tensor:
    """What the teacher says of each word, marked in its text [N, C]."""
    found = []
    for row in rows:
        text = row["text"]
        for start, end, _ in words_of(row):
            prompt = f"{text[:start]}<<< {text[start:end]} >>>{text[end:]}\n"
            found.append(classified.class_logprobs(models / "teacher", prompt, SAID))
    return torch.stack(found).log_softmax(-1)


def rows_in(config: Config, part: str) -> list[dict[str, Any]]:
    (domain,) = config.domains.values()
    return [json.loads(line) for line in Path(getattr(domain, part)).read_text().splitlines()]


def labels_of(rows: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([TAGS.index(tag) for row in rows for *_, tag in words_of(row)])


def f1_of(truth: list[list[str]], guess: list[list[str]], **options: Any) -> Any:
    """Of seqeval, 0 where nothing is found."""
    return f1_score(truth, guess, **options | {"zero_division": 0})


def tagger(config: Config) -> Any:
    torch.manual_seed(config.seed)
    return (
        AutoModelForTokenClassification.from_pretrained(
            config.student.model, num_labels=len(TAGS), dtype=torch.float32
        )
        .double()
        .eval()
    )


def plain_loop(config: Config, p_NC: Tensor) -> tuple[list[dict], Any]:
    rows, tokenizer = rows_in(config, "train"), AutoTokenizer.from_pretrained(config.student.model)
    model, out, label_N = tagger(config), [], labels_of(rows)
    optimiser, rates = adamw(model, config), rates_of(config)
    for step in range(config.steps):
        logits_NC = logits_of(model, tokenizer, rows)
        tempered = [x.div(2.0).log_softmax(-1) for x in (p_NC, logits_NC)]
        soft = F.kl_div(tempered[1], tempered[0], log_target=True, reduction="sum")
        loss = 0.7 * 4 * soft / len(label_N) + 0.4 * F.cross_entropy(logits_NC, label_N)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm or 0)
        for group in optimiser.param_groups:
            group["lr"] = rates[step]
        optimiser.step()
        out.append({"loss": float(loss.detach()), "norm": float(norm)})
    return out, model


def test_steps_are_those_of_a_plain_loop_and_entities_are_scored_as_seqeval_does(tmp_path, models):
    options = {"batch": ALL, "losses": LOSSES, "optimiser": OPTIMISER | {"clip_norm": 0.1}}
    asked = {"model": str(models / "own"), "zero": 2, "workers": 2}
    config = config_of(tmp_path, "run", models=models, student=asked, **options)
    trained([plan_of(config)], tmp_path / "jobs", ranks=2)
    rows, held_out = rows_in(config, "train"), rows_in(config, "validation")
    steps, model = plain_loop(config, taught(models, rows))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        assert line.tokens == len(labels_of(rows))
        assert line.loss == pytest.approx(step["loss"], rel=1e-6)
        assert line.grad_norm == pytest.approx(step["norm"], rel=3e-6)
    found = weights_after(tmp_path / "run", config.steps)
    for name, weight in model.named_parameters():
        assert (found[name].double() - weight).abs().max() <= 1e-6, name
    written = json.loads((tmp_path / "run" / "evaluations.json").read_text())["after"]["names"]
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    with torch.no_grad():
        student_NC = logits_of(model, tokenizer, held_out)
    for who, said_NC in (("student", student_NC), ("teacher", taught(models, held_out))):
        told = iter(said_NC.argmax(-1).tolist())
        guess = [[TAGS[next(told)] for _ in words_of(row)] for row in held_out]
        truth = [[tag for *_, tag in words_of(row)] for row in held_out]
        scores = written[f"{who}_scores"]
        assert scores["span_f1"] == pytest.approx(f1_of(truth, guess))
        by_type = dict(zip(("kind", "place"), f1_of(truth, guess, average=None), strict=True))
        assert {n: one["span_f1"] for n, one in scores["types"].items()} == pytest.approx(by_type)
    exported = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "export")
    assert exported.config.id2label == dict(enumerate(TAGS))


LORA = {"kind": "lora", "r": 3, "target_modules": "all-linear"}
# By name: what is off its default in a run that is killed at its middle.
RUNS: dict[str, dict[str, Any]] = {
    "adapters": {"student": {"model": "bert", "zero": 3, "train": LORA}},
    "causal": {"student": {"model": "student", "zero": 1}, "losses": [{"kind": "cross_entropy"}]},
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path
) -> Path:
    """A folder with the runs, and each again from the checkpoint at its middle."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    for name in asked(request, "name", among=RUNS):
        options = RUNS[name]
        student = options["student"] | {"model": str(models / options["student"]["model"])}
        given = options | {"student": student, "log_every": 3}
        config = config_of(folder, name, models=models, **given)
        jobs.append(as_job("resumed", plan_of(config), at=2))
    run_jobs(jobs, folder / "jobs", ranks=2)
    return folder


@pytest.mark.parametrize("name", telling(RUNS, "adapters"))
def test_a_killed_run_ends_with_the_same_bits(runs, name):
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)


@pytest.mark.parametrize("name", telling(RUNS, "adapters"))
def test_the_card_of_an_export_says_how_to_use_it(runs, name, monkeypatch):
    export = runs / name / "export"
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(export)
    told: list[Any] = []
    exec(code, {"print": told.append})
    assert all(token and tag in TAGS for token, tag in told[0])
