"""A classifier learns what a plain loop of transformers teaches it, and its run is like any other.

N rows   C classes
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.config.run import Config
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from shared.run.run_dir import RunDir
from student_trainer.state.checkpoint import latest_checkpoint
from student_trainer.state.merge import merge_checkpoint
from student_trainer.tasks.classification import Classification
from tests.student_trainer.comparing import comparable_lines, same_weights, weights_after
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import adamw, rates_of
from tests.student_trainer.processes import as_job
from tests.student_trainer.tasks import classified
from tests.student_trainer.tasks.classified import LABELS, TEMPLATE, config_of, plan_of
from tests.telling import asked, telling

STEPS = 4
LOSSES = [
    {"kind": "forward_kl", "temperature": 2.0, "weight": 0.7},
    {"kind": "cross_entropy", "weight": 0.4},
]
OPTIMISER = {
    "lr": 5e-3,
    "betas": (0.7, 0.8),
    "eps": 1e-3,  # large beside rounding, which Adam would make steps of
    "weight_decay": 0.3,
    "warmup_steps": 2,
    "clip_norm": 0.1,
}
EVERY = {"rows_per_step": 24, "micro_batch": 4}  # all rows are drawn at every step


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    classified.save_models(folder)
    return folder


def rows_in(config: Config, part: str) -> list[dict[str, str]]:
    paths = [Path(getattr(domain, part)) for domain in config.domains.values()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Text by text, unpadded [N, C]."""
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def plain_loop(config: Config, models: Path) -> tuple[list[dict], dict[str, Tensor], dict]:
    """Losses and KL of each step, the weights after them, and the evaluation of validation rows."""
    rows, held_out = rows_in(config, "train"), rows_in(config, "validation")
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    model, out = classified.classifier(config), []
    optimiser, rates = adamw(model, config), rates_of(config)
    p_NC, own_NC = (taught(models, part) for part in (rows, held_out))
    label_N = torch.tensor([LABELS.index(row["label"]) for row in rows])
    for step in range(config.steps):
        logits_NC = logits_of(model, tokenizer, [row["text"] for row in rows])
        q_NC = logits_NC.log_softmax(-1)
        tempered = [x.div(2.0).log_softmax(-1) for x in (p_NC, logits_NC)]
        soft = 4 * F.kl_div(tempered[1], tempered[0], log_target=True, reduction="sum") / len(rows)
        hard = F.cross_entropy(logits_NC, label_N)
        loss = 0.7 * soft + 0.4 * hard
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm or 0)
        for group in optimiser.param_groups:
            group["lr"] = rates[step]
        optimiser.step()
        kl = float((p_NC.exp() * (p_NC - q_NC.detach())).sum(-1).mean())
        out.append({"loss": float(loss.detach()), "norm": float(norm), "kl": kl})
    with torch.no_grad():
        q_NC = logits_of(model, tokenizer, [row["text"] for row in held_out]).log_softmax(-1)
    label_N = torch.tensor([LABELS.index(row["label"]) for row in held_out])
    return out, dict(model.named_parameters()), scores(p_NC=own_NC, q_NC=q_NC, label_N=label_N)


def taught(models: Path, rows: list[dict[str, str]]) -> Tensor:
    """What the teacher says of rows [N, C]."""
    prompts = [TEMPLATE.replace("{text}", row["text"]) + "\n" for row in rows]
    found = [classified.class_logprobs(models / "teacher", prompt) for prompt in prompts]
    return torch.stack(found).log_softmax(-1)


def scores(*, p_NC: Tensor, q_NC: Tensor, label_N: Tensor) -> dict[str, float]:
    right_N = q_NC.argmax(-1) == label_N
    f1 = []
    for label in range(len(LABELS)):
        hits = int((right_N & (label_N == label)).sum())
        both = int((label_N == label).sum() + (q_NC.argmax(-1) == label).sum())
        f1 += [2 * hits / both] if both else []
    return {
        "nll": float(F.nll_loss(q_NC, label_N)),
        "kl": float((p_NC.exp() * (p_NC - q_NC)).sum(-1).mean()),
        "accuracy": float(right_N.double().mean()),
        "macro_f1": sum(f1) / len(f1),
        "teacher_accuracy": float((p_NC.argmax(-1) == label_N).double().mean()),
    }


def trained(plans: list[RunPlan], folder: Path, *, ranks: int) -> None:
    for found in run_jobs([as_job("train", plan) for plan in plans], folder, ranks=ranks):
        assert found["error"] is None, found


def pooled(run: Path, name: str) -> float:
    """A mean over both domains, which have as many validation rows."""
    after = json.loads((run / "evaluations.json").read_text())["after"]
    model, _, score = name.partition(".")
    return sum(v[model][score] if score else v[model] for v in after.values()) / len(after)


@pytest.mark.parametrize(("student", "zero"), telling([("own", 2), ("student", 3)], ("own", 2)))
def test_steps_are_those_of_a_plain_loop(tmp_path, models, student, zero):
    options = {"steps": STEPS, "batch": EVERY, "losses": LOSSES, "optimiser": OPTIMISER}
    asked = {"model": str(models / student), "zero": zero, "workers": 2}
    config = config_of(tmp_path, "run", models=models, student=asked, **options)
    trained([plan_of(config)], tmp_path / "jobs", ranks=2)
    steps, weights, after = plain_loop(config, models)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == len(steps) == STEPS
    for line, step in zip(lines, steps, strict=True):
        assert line.tokens == 24
        assert line.loss == pytest.approx(step["loss"], rel=1e-6)
        assert line.grad_norm == pytest.approx(step["norm"], rel=3e-6)
        kl = sum(domain.kl or 0 for domain in line.domains.values()) / len(line.domains)
        assert kl == pytest.approx(step["kl"], rel=1e-5)
    found = weights_after(tmp_path / "run", STEPS)
    assert {name: weight.shape for name, weight in found.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    for name, weight in weights.items():
        assert (found[name].double() - weight).abs().max() <= 1e-6, name
    run = tmp_path / "run"
    assert pooled(run, "student_nll") == pytest.approx(after["nll"], rel=1e-6)
    assert pooled(run, "kl") == pytest.approx(after["kl"], rel=1e-5)
    assert pooled(run, "student_scores.accuracy") == pytest.approx(after["accuracy"])
    assert pooled(run, "teacher_scores.accuracy") == pytest.approx(after["teacher_accuracy"])
    exported = AutoModelForSequenceClassification.from_pretrained(run / "export")
    assert exported.config.id2label == dict(enumerate(LABELS))


LORA = {"kind": "lora", "r": 3, "target_modules": "all-linear"}
TAID = {"kind": "taid", "t_start": 0.2, "t_end": 0.9}
TEXT = {"kind": "cross_entropy", "weight": 0.5}
# By name: what is off its default in a run that is killed at its middle.
RUNS: dict[str, dict[str, Any]] = {
    "adapters": {
        "student": {"model": "bert", "zero": 3, "train": LORA},
        "weighting": {"policy": "llkd", "confidence": 1.0, "uncertainty": 0.1},
    },
    "causal": {
        "student": {"model": "student", "zero": 1},
        "weighting": {"policy": "instance_weights", "final_steepness": 1.0},
        "losses": [TAID, TEXT],
    },
    "small": {"student": {"model": "tiny", "zero": 3}},
    "padless": {"student": {"model": "student", "train": LORA}},  # whose config names no padding
}


def run_of(folder: Path, name: str, models: Path) -> Config:
    options = RUNS[name]
    name_of = options["student"]["model"]
    where = name_of if name_of == "tiny" else str(models / name_of)
    given = options | {"student": options["student"] | {"model": where}, "log_every": 3}
    return config_of(folder, name, models=models, **given)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path
) -> Path:
    """A folder with the runs, and each again from the checkpoint at its middle."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    for name in asked(request, "name", among=RUNS, always=("adapters", "small")):
        jobs.append(as_job("resumed", plan_of(run_of(folder, name, models)), at=2))
    run_jobs(jobs, folder / "jobs", ranks=2)
    return folder


@pytest.mark.parametrize("name", telling(RUNS, "adapters", "small"))
def test_a_killed_run_ends_with_the_same_bits(runs, name):
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)


def test_what_is_learnt_of_each_class_is_in_the_lines(runs):
    lines = read_metrics(runs / "adapters" / "metrics.jsonl")
    shares = [share for line in lines for share in (line.selected_by_class or {}).items()]
    assert {name for name, _ in shares} <= set(LABELS)
    assert any(0 < share < 1 for _, share in shares)
    (first, *_) = read_metrics(runs / "small" / "metrics.jsonl")
    assert first.selected_by_class is None


def test_an_adapted_student_is_used_with_peft_alone(runs, models):
    config = config_of(runs, "adapters", models=models)
    trained = AutoPeftModelForSequenceClassification.from_pretrained(
        runs / "adapters" / "export", num_labels=len(LABELS)
    ).eval()
    base = classified.classifier(config).float()
    read = AutoTokenizer.from_pretrained(models / "bert")("def name", return_tensors="pt")
    with torch.no_grad():
        assert not torch.allclose(trained(**read).logits, base(**read).logits)
    assert json.loads((runs / "adapters" / "export" / "tutelage.json").read_text())["labels"] == [
        *LABELS
    ]


@pytest.mark.parametrize("name", telling(["adapters", "padless"], "adapters"))
def test_an_adapted_student_is_merged_into_one_model_that_pads(runs, models, name):
    config = run_of(runs, name, models)
    kind = Classification(LABELS).model
    checkpoint = latest_checkpoint(runs / name / "checkpoints")
    assert checkpoint is not None
    off = merge_checkpoint(checkpoint, config=config, run_dir=RunDir(runs / name), kind=kind)
    assert off < 1e-5
    folder = RunDir(runs / name).merged
    assert json.loads((folder / "tutelage.json").read_text())["labels"] == [*LABELS]
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert whole.config.id2label == dict(enumerate(LABELS))
    assert whole.config.pad_token_id is not None
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(
        runs / name / "export", num_labels=len(LABELS)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["def name", "return self value if not name"]
    with torch.no_grad():
        padded = whole(**tokenizer(texts, return_tensors="pt", padding=True)).logits
        alone = logits_of(adapted, tokenizer, texts)
        adapted.config.pad_token_id = tokenizer.pad_token_id  # as its card says
        together = adapted(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", telling(RUNS, "adapters", "small"))
def test_the_card_of_an_export_says_how_to_use_it(runs, name, monkeypatch):
    export = runs / name / "export"
    card = (export / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(export)
    told: list[str] = []
    exec(code, {"print": told.append})
    assert len(told) == 1
    assert told[0] in LABELS


def test_the_small_network_is_the_mean_of_hashed_embeddings_under_two_layers(runs):
    export = runs / "small" / "export"
    found = AutoModelForSequenceClassification.from_pretrained(export)
    assert found.num_parameters() == 1024 * 16 + 17 * 64 + 65 * len(LABELS)
    tokenizer = AutoTokenizer.from_pretrained(export)
    texts = ["def name", "return self value if not name"]
    asked = tokenizer(texts, return_tensors="pt", padding=True)
    w = {name: weight.double() for name, weight in found.state_dict().items()}
    for text, logits_C in zip(texts, found(**asked).logits, strict=True):
        rows = [i * 2_654_435_761 % 2**32 * 1024 // 2**32 for i in tokenizer(text)["input_ids"]]
        mean_D = torch.stack([w["embedding.weight"][row] for row in rows]).mean(0)
        inner_H = (w["hidden.weight"] @ mean_D + w["hidden.bias"]).clamp(min=0)
        expected_C = w["classifier.weight"] @ inner_H + w["classifier.bias"]
        torch.testing.assert_close(logits_C.double(), expected_C, rtol=0, atol=1e-6)


def test_one_rank_learns_what_two_do(tmp_path, models):
    options = {"steps": 2, "losses": LOSSES}
    for ranks in (1, 2):
        student = {"model": str(models / "own"), "workers": ranks}
        config = config_of(tmp_path, f"of{ranks}", models=models, student=student, **options)
        trained([plan_of(config)], tmp_path / f"jobs{ranks}", ranks=ranks)
    one, two = (read_metrics(tmp_path / f"of{ranks}" / "metrics.jsonl") for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-6)
    found, expected = (weights_after(tmp_path / f"of{ranks}", 2) for ranks in (1, 2))
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-5, name


def test_latif_s_loss_is_torch_s_cross_entropy_with_labels_and_with_probabilities(tmp_path, models):
    sections = [
        {"kind": "cross_entropy"},
        {"kind": "soft_cross_entropy", "temperature": 1.0, "weight": 0.7},
    ]
    student = {"model": "tiny", "workers": 1, "zero": 0}
    options = {"steps": 1, "batch": EVERY, "losses": sections, "student": student}
    config = config_of(tmp_path, "run", models=models, **options)
    trained([plan_of(config)], tmp_path / "jobs", ranks=1)
    rows = rows_in(config, "train")
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    f = logits_of(classified.classifier(config), tokenizer, [row["text"] for row in rows]).detach()
    p_NC = taught(models, rows).exp()
    label_N = torch.tensor([LABELS.index(row["label"]) for row in rows])
    expected = F.cross_entropy(f, label_N) + 0.7 * F.cross_entropy(f, p_NC)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line.loss == pytest.approx(float(expected), rel=1e-6)
