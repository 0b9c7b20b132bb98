"""A student that marks entities learns what a plain loop of transformers teaches it, and what it
marks is its likeliest copy of each text.

N positions with loss   T tokens   D width
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.across.token_bytes import token_bytes
from shared.config.run import Config
from shared.run.metrics import read_metrics
from tests.student_trainer.comparing import comparable_lines, same_weights, weights_after
from tests.student_trainer.evaluation.test_copying import copies_of
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import adamw, rates_of
from tests.student_trainer.processes import as_job
from tests.student_trainer.tasks import classified
from tests.student_trainer.tasks.classified import plan_of
from tests.student_trainer.tasks.tagged import config_of
from tests.student_trainer.tasks.test_classification import OPTIMISER, trained
from tests.student_trainer.tasks.test_tagging import rows_in

TYPES = ("kind", "place")
TASK = {"kind": "marking", "template": "{type}: {text}", "types": list(TYPES)}
LAYER, TAU, EPSILON = 1, 0.2, 0.3
LOSSES = [
    {"kind": "cross_entropy", "weight": 0.4},
    {"kind": "entity_contrast", "layer": LAYER, "tau": TAU, "epsilon": EPSILON, "weight": 0.5},
]
SHORT = {"context": 128}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    classified.save_models(folder)
    return folder


def documents(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], int, list[int]]]:
    """Token ids, how many are of the prompt, and of each other the number of its entity, 0 of other
    text, -1 of a mark or the end; by another way than ours."""
    found = []
    for row in rows:
        for name in TYPES:
            text = f"{name}: {row['text']}\n"
            pieces, last = [(text, -2)], 0
            for number, one in enumerate(e for e in row["entities"] if e["type"] == name):
                pieces += [(row["text"][last : one["start"]], 0), ("<<< ", -1)]
                pieces += [(row["text"][one["start"] : one["end"]], number + 1), (" >>>", -1)]
                last = one["end"]
            pieces.append((row["text"][last:], 0))
            whole = "".join(part for part, _ in pieces)
            of = [number for part, number in pieces for _ in part]
            read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            kinds = [-1]
            for start, end in read["offset_mapping"]:
                own = {number for number in of[start:end] if number > -2}
                kinds.append(max(own) if max(own, default=-2) > 0 else min(own, default=-2))
            kinds[0] = -2
            ids = [tokenizer.bos_token_id, *read["input_ids"], tokenizer.eos_token_id]
            found.append((ids, kinds.index(next(k for k in kinds if k > -2)), [*kinds, -1]))
    return found


def losses_of(model: Any, ids: list[int], first: int, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """The sum of the NLL of the labels, and of the contrast of the entities' tokens."""
    ids_1T, labels = torch.tensor([ids]), torch.tensor(ids[first:])
    embedded = model.get_input_embeddings()(ids_1T)

    def nll(inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = model(inputs_embeds=inputs, output_hidden_states=True)
        logits = output.logits[0, first - 1 : -1]
        own = F.cross_entropy(logits, labels, reduction="sum")
        return own, output.hidden_states[LAYER][0]

    leaf = embedded.detach().requires_grad_()
    (slope,) = torch.autograd.grad(nll(leaf)[0], leaf)
    move = EPSILON * F.normalize(slope, dim=-1)
    loss, states = nll(embedded)
    _, copied = nll(embedded + move)
    kind_T, contrast = torch.tensor(kinds), torch.zeros((), dtype=torch.float64)
    around = states[kind_T == 0]
    for number in range(1, int(kind_T.max()) + 1):
        own = kind_T == number
        near = F.cosine_similarity(states[own].mean(0), copied[own].mean(0), dim=0) / TAU
        far = F.cosine_similarity(states[own].mean(0)[None], around, dim=1) / TAU
        contrast = contrast + own.sum() * (torch.cat([near[None], far]).logsumexp(0) - near)
    return loss, contrast


def plain_loop(config: Config) -> tuple[list[dict[str, float]], Any]:
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    rows = documents(rows_in(config, "train"), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(config.student.model, dtype=torch.float32)
    model = model.double().eval()
    optimiser, rates, found = adamw(model, config), rates_of(config), []
    count = sum(len(ids) - first for ids, first, _ in rows)
    for step in range(config.steps):
        parts = [losses_of(model, *row) for row in rows]
        nll, contrast = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        loss = (0.4 * nll + 0.5 * contrast) / count
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm or 0)
        for group in optimiser.param_groups:
            group["lr"] = rates[step]
        optimiser.step()
        found.append({"loss": float(loss.detach()), "norm": float(norm), "tokens": count})
    return found, model


def tags_told(model: Any, tokenizer: Any, row: dict[str, Any], name: str) -> list[str]:
    """The tags of the words by the likeliest token of those with which some copy goes on."""
    parts = token_bytes(tokenizer, model="").texts
    whole = copies_of(row["text"])
    begun = {copy[:size] for copy in whole for size in range(len(copy) + 1)}
    asked = tokenizer(f"{name}: {row['text']}\n", add_special_tokens=False)["input_ids"]
    ids, written = [tokenizer.bos_token_id, *asked], b""
    while written not in whole:
        allowed = [n for n, part in enumerate(parts) if part and written + part in begun]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, allowed]
        ids.append(allowed[int(logits.argmax())])
        written += parts[ids[-1]] or b""
    tags, inside = [], ""
    for match in re.finditer(r"<<< | >>>|\w+|[^\w\s]", written.decode()):
        if match.group() in ("<<< ", " >>>"):
            inside = "B" if match.group() == "<<< " else ""
            continue
        tags.append(f"{inside}-{name}" if inside else "O")
        inside = "I" if inside else ""
    return tags


def test_steps_are_those_of_a_plain_loop_and_entities_those_of_its_likeliest_copies(
    tmp_path, models
):
    options = {
        "task": TASK,
        "data": SHORT,
        "batch": {"rows_per_step": 24, "micro_batch": 3},
        "losses": LOSSES,
        "optimiser": OPTIMISER | {"clip_norm": 0.1},
    }
    asked = {"model": str(models / "student"), "zero": 2, "workers": 2}
    config = config_of(tmp_path, "run", models=models, student=asked, **options)
    trained([plan_of(config)], tmp_path / "jobs", ranks=2)
    steps, model = plain_loop(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        assert line.tokens == step["tokens"]
        assert line.loss == pytest.approx(step["loss"], rel=1e-6)
        assert line.grad_norm == pytest.approx(step["norm"], rel=3e-6)
    found = weights_after(tmp_path / "run", config.steps)
    for name, weight in model.named_parameters():
        if name in found:
            assert (found[name].double() - weight).abs().max() <= 1e-6, name
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    rows = rows_in(config, "validation")
    truth, guess = [], []
    for row in rows:
        for name in TYPES:
            plain = tags_told(model, tokenizer, row, name)
            guess.append(plain)
            truth.append(true_tags(row, name))
    written = json.loads((tmp_path / "run" / "evaluations.json").read_text())["after"]["names"]
    scores = written["student_scores"]
    assert scores["span_f1"] == pytest.approx(f1_score(truth, guess))
    assert any(tag != "O" for tags in guess for tag in tags)


def true_tags(row: dict[str, Any], name: str) -> list[str]:
    found = []
    for match in re.finditer(r"\w+|[^\w\s]", row["text"]):
        own = [e for e in row["entities"] if e["type"] == name]
        inside = [e for e in own if e["start"] <= match.start() < e["end"]]
        begins = inside and inside[0]["start"] == match.start()
        found.append(f"{'B' if begins else 'I'}-{name}" if inside else "O")
    return found


@pytest.mark.drill
def test_a_killed_run_with_adapters_ends_with_the_same_bits(tmp_path, models):
    lora = {"kind": "lora", "r": 3, "target_modules": "all-linear", "dropout": 0.1}
    student = {"model": str(models / "student"), "zero": 1, "workers": 2, "train": lora}
    options = {"task": TASK, "data": SHORT, "losses": LOSSES, "log_every": 3}
    config = config_of(tmp_path, "run", models=models, student=student, **options)
    run_jobs([as_job("resumed", plan_of(config), at=2)], tmp_path / "jobs", ranks=2)
    assert same_weights(tmp_path / "run", tmp_path / "run-resumed")
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "run-resumed")
