"""A student of image and text learns what a plain loop of transformers teaches it.

N positions with loss   V vocabulary   T tokens
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.config.run import Config
from shared.run.metrics import read_metrics
from shared.run.plan import RunPlan
from tests import pictured
from tests.pictured import config_of, plan_of, rows_in
from tests.student_trainer.comparing import comparable_lines, same_weights
from tests.student_trainer.group import run_jobs
from tests.student_trainer.plain_loop import rates_of
from tests.student_trainer.processes import as_job
from tests.telling import asked, telling
from tests.tiny import Pair

STEPS = 3
OPTIMISER = {
    "lr": 5e-3,
    "betas": (0.7, 0.8),
    "eps": 1e-3,  # large beside rounding, which Adam would make steps of
    "weight_decay": 0.3,
    "warmup_steps": 2,
    "clip_norm": 0.1,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pictured.save_pair(tmp_path_factory.mktemp("models"))


def inputs_of(processor: Any, row: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """What the processor makes of a row, and how many tokens its response has with its end."""
    prompt, end = row["prompt"], processor.tokenizer.eos_token
    if "<image>" not in prompt:
        prompt = "<image>" * len(row["images"]) + "\n" + prompt
    text = processor.tokenizer.bos_token + prompt + "\n" + row["response"] + end
    told = {"add_special_tokens": False, "return_tensors": "pt"}
    made = processor(text=[text], images=[row["images"]], **told)
    bare = processor.tokenizer(row["response"] + end, add_special_tokens=False)["input_ids"]
    return {n: made[n] for n in ("input_ids", "pixel_values")}, len(bare)


def logits_of(model: Any, processor: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a response the logits [N, V] and the labels [N]."""
    made, count = inputs_of(processor, row)
    pixels = made["pixel_values"].to(model.dtype)
    logits_TV = model(input_ids=made["input_ids"], pixel_values=pixels).logits[0]
    return logits_TV[-1 - count : -1], made["input_ids"][0, -count:]


def bucketed(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    kept_NK = logp_NV.gather(1, ids_NK)
    others_NV = logp_NV.scatter(1, ids_NK, float("-inf"))
    return torch.cat([kept_NK, others_NV.logsumexp(1, keepdim=True)], dim=1)


def load(folder: str | Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.double().eval()


def adamw_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not: the class embedding of an image is one."""
    options, weights = config.optimiser, list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def plain_loop(config: Config) -> tuple[list[dict], dict[str, Tensor], dict[str, float]]:
    """Losses and norms of each step on all rows, the weights in use after them, NLL and KL of
    validation rows."""
    rows, model = rows_in(config, "train"), load(config.student.model)
    teacher, processor = (
        load(config.teachers["t"].model),
        AutoProcessor.from_pretrained(config.student.model),
    )
    optimiser, rates, out = adamw_of(model, config), rates_of(config), []
    with torch.no_grad():
        p_NV = torch.cat([logits_of(teacher, processor, row)[0] for row in rows]).log_softmax(-1)
    ids_NK = p_NV.topk(config.targets.top_k).indices
    for step in range(config.steps):
        found = [logits_of(model, processor, row) for row in rows]
        q_NV = torch.cat([logits for logits, _ in found]).log_softmax(-1)
        label_N = torch.cat([label for _, label in found])
        p, q = bucketed(p_NV, ids_NK), bucketed(q_NV, ids_NK)
        loss = (p.exp() * (p - q)).sum(-1).mean() + 0.5 * F.nll_loss(q_NV, label_N)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm or 0)
        for group in optimiser.param_groups:
            group["lr"] = rates[step]
        optimiser.step()
        out.append({"loss": float(loss.detach()), "norm": float(norm), "tokens": len(label_N)})
    with torch.no_grad():
        held = rows_in(config, "validation")
        p_NV = torch.cat([logits_of(teacher, processor, row)[0] for row in held]).log_softmax(-1)
        found = [logits_of(model, processor, row) for row in held]
    q_NV = torch.cat([logits for logits, _ in found]).log_softmax(-1)
    nll = float(F.nll_loss(q_NV, torch.cat([label for _, label in found])))
    kl = float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean())
    used = {name: p for name, p in model.named_parameters() if p.grad is not None}
    return out, used, {"nll": nll, "kl": kl}


def trained(plans: list[RunPlan], folder: Path, *, ranks: int) -> None:
    for found in run_jobs([as_job("train", plan) for plan in plans], folder, ranks=ranks):
        assert found["error"] is None, found


def test_steps_are_those_of_a_plain_loop(tmp_path, pair):
    every = {"rows_per_step": 12, "micro_batch": 3}  # all rows are drawn at every step
    options = {"steps": STEPS, "optimiser": OPTIMISER, "batch": every}
    config = config_of(tmp_path, "run", pair=pair, **options)
    trained([plan_of(config)], tmp_path / "jobs", ranks=2)
    steps, weights, after = plain_loop(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line, step in zip(lines, steps, strict=True):
        assert line.tokens == step["tokens"]
        assert line.loss == pytest.approx(step["loss"], rel=1e-6)
        assert line.grad_norm == pytest.approx(step["norm"], rel=3e-6)
    found = dict(load(tmp_path / "run" / "export").named_parameters())
    for name, weight in weights.items():
        assert (found[name] - weight).abs().max() <= 1e-6, name
    shapes = json.loads((tmp_path / "run" / "evaluations.json").read_text())["after"]["shapes"]
    assert shapes["student_nll"] == pytest.approx(after["nll"], rel=1e-6)
    assert shapes["kl"] == pytest.approx(after["kl"], rel=1e-5)


LORA = {"kind": "lora", "r": 3}


RUNS: dict[str, dict[str, Any]] = {
    "whole": {"student": {"zero": 3}},
    "adapters": {"student": {"zero": 1, "train": LORA}, "batch": {"micro_batch": 1}},
    "pairs": {"losses": [{"kind": "preference", "beta": 0.3}], "data": {"context": 96}},
}


def half_bare(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Every second row without an image."""
    return row if number % 2 else row | {"images": [], "prompt": "Say red"}


def as_pair(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A preference for what a row answers."""
    return row | {"chosen": row["response"], "rejected": f"nothing {number}"}


def rewritten(config: Config, change: Any) -> Config:
    """The config with its rows changed, in files beside theirs."""
    (domain,), paths = config.domains.values(), {}
    for split in ("train", "validation"):
        path = Path(getattr(domain, split))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [json.dumps(change(row, number)) for number, row in enumerate(rows)]
        paths[split] = path.with_name(f"{path.stem}-{change.__name__}.jsonl")
        paths[split].write_text("\n".join(changed) + "\n")
    named = {split: str(path) for split, path in paths.items()}
    return config.model_copy(update={"domains": {"shapes": domain.model_copy(update=named)}})


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pair: Pair
) -> Path:
    """A folder with runs of two ranks, each again from the checkpoint at its middle."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    for name in asked(request, "name", among=RUNS, always=("whole",)):
        config = config_of(folder, name, pair=pair, log_every=3, **RUNS[name])
        if name != "whole":
            config = rewritten(config, half_bare if name == "adapters" else as_pair)
        jobs.append(as_job("resumed", plan_of(config), at=2))
    run_jobs(jobs, folder / "jobs", ranks=2)
    return folder


@pytest.mark.parametrize("name", telling(RUNS, "whole"))
def test_a_killed_run_ends_with_the_same_bits(runs, name):
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert same_weights(straight, resumed)
    assert comparable_lines(straight) == comparable_lines(resumed)


def test_an_export_is_used_with_transformers_alone(runs, pair):
    """The processor that lies beside it puts images in the same places."""
    config = config_of(runs, "whole", pair=pair)
    own = AutoProcessor.from_pretrained(runs / "whole" / "export")
    before, model = AutoProcessor.from_pretrained(pair.student), load(runs / "whole" / "export")
    row = rows_in(config, "validation")[2]
    made, _ = inputs_of(own, row)
    for name, value in inputs_of(before, row)[0].items():
        assert torch.equal(made[name], value), name
    assert model(**made).logits.isfinite().all()
    assert "AutoModelForImageTextToText" in (runs / "whole" / "export" / "README.md").read_text()
