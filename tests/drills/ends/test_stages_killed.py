"""LLaVA-MoD's recipe on captions of shapes: three stages of one run, killed in one and between two,
end with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import cluster
from shared.run.metrics import read_metrics
from shared.run.run_dir import RunDir
from tests import pictured
from tests.drills.commands import Home, reached, wait_until

RECIPE = Path(cluster.__file__).parent / "recipes" / "llava_mod.yaml"
ROUTED = (".mlp.experts.", ".mlp.gate.")

pytestmark = pytest.mark.drill


def save_pairs(captions: Path) -> Path:
    """The captions of a file as pairs, in a file beside it; what another row says is rejected."""
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    lines = [
        json.dumps(row | {"chosen": row["response"], "rejected": other["response"]}) + "\n"
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        if row["response"] != other["response"]
    ]
    path = captions.with_name(f"pairs-{captions.name}")
    path.write_text("".join(lines))
    return path


def options_of(folder: Path) -> list[str]:
    """Overrides with which the recipe runs on tiny models, a few steps in each stage."""
    pair = pictured.save_pair(folder / "models")
    train = pictured.captions(folder / "rows", "train", count=24)
    valid = pictured.captions(folder / "rows", "valid", count=6, seed=5)
    tiny = {"cpus": 0.4, "gpus": 0, "dtype": "float32"}
    pairs = {"train": str(save_pairs(train)), "validation": str(save_pairs(valid))}
    options = {
        "paths.cache": str(folder / "cache"),
        "teachers": {"t": {"model": str(pair.teacher), **tiny}},
        "student": {"model": str(pair.student), "zero": 2, **tiny},
        "domains": {"captions": {"train": str(train), "validation": str(valid)}},
        "stages.preference.domains": {"pairs": pairs},
        "steps": 8,
        "stages.preference.steps": 6,
        "stages.preference.optimiser.lr": 3e-3,
        "log_every": 1,
        "data.context": 96,
        "batch": {"rows_per_step": 8, "micro_batch": 4},
        "optimiser": {"lr": 1e-2, "warmup_steps": 1},
        "checkpoints.every": 3,
    }
    return [f"{name}={json.dumps(value)}" for name, value in options.items()]


def stages_in(runs: Path) -> dict[str, RunDir]:
    """The folders of the stages."""
    whole = runs / "llava_mod"
    earlier = {name: whole / "stages" / f"llava_mod-{name}" for name in ("dense", "sparse")}
    return {name: RunDir(path) for name, path in (earlier | {"preference": whole}).items()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, RunDir], dict[str, RunDir]]:
    """The stages of a run that nobody disturbed, and of one that was killed twice."""
    folder = tmp_path_factory.mktemp("job")
    home, options = Home(tmp_path_factory.mktemp("home")), options_of(folder)
    straight, killed = folder / "straight", folder / "killed"
    try:
        home.run("run", str(RECIPE), *options, f"paths.runs={straight}")
        command = ["run", str(RECIPE), *options, f"paths.runs={killed}"]
        sparse = stages_in(killed)["sparse"]
        for moment in (reached(sparse.path, 4), lambda: sparse.finished):
            under_way = home.start(*command)
            wait_until(moment, doing=under_way)
            under_way.kill_everything()
            home.clear()
        assert not stages_in(killed)["preference"].finished
        home.run(*command)
    finally:
        home.clear()
    return stages_in(straight), stages_in(killed)


def weights_of(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run_dir.export / "model.safetensors")


def measured(run_dir: RunDir, when: str) -> dict[str, float]:
    found = json.loads((run_dir.path / "evaluations.json").read_text())[when]
    return next(iter(found.values()))


@pytest.mark.parametrize("stage", ["dense", "sparse", "preference"])
def test_killed_in_a_stage_and_between_two_they_end_with_the_same_bits(ended, stage):
    straight, killed = (stages[stage] for stages in ended)
    expected, found = weights_of(straight), weights_of(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = ([line.loss for line in read_metrics(one.metrics)] for one in (straight, killed))
    assert len({*map(tuple, losses)}) == 1


def test_each_stage_does_what_it_is_for(ended):
    """The dense student comes near its teacher; experts begin as it ended, and they and their
    routers alone move, by captions and then by pairs."""
    stages, _ = ended
    dense, sparse = measured(stages["dense"], "after"), measured(stages["sparse"], "before")
    assert dense["kl"] < 0.7 * measured(stages["dense"], "before")["kl"]
    assert sparse["kl"] == pytest.approx(dense["kl"], rel=1e-5)
    before, after, last = (weights_of(stages[name]) for name in stages)
    kept = [name for name in before if name in after]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    moved = [name for name in after if not torch.equal(after[name], last[name])]
    assert moved
    assert all(any(part in name for part in ROUTED) for name in moved)
    (*_, line) = read_metrics(stages["preference"].metrics)
    assert set(line.terms) == {"preference", "router_balance"}


def test_the_last_export_is_a_mixture_that_transformers_loads(ended):
    stages, _ = ended
    asked: Any = {"output_loading_info": True}
    model, found = AutoModelForImageTextToText.from_pretrained(stages["preference"].export, **asked)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.config.text_config.model_type == "qwen2_moe"
    card = (stages["preference"].export / "README.md").read_text()
    assert "llava_mod-dense, upcycled to 4 experts in one layer in 2, 2 a token" in card
