"""`tutelage export --merge`: base and adapter as one model, for LoRA and QLoRA."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cluster.cli import main
from shared.config.file import dump
from shared.errors import ConfigError
from shared.model_parts import tolerance
from shared.run.run_dir import RunDir
from student_trainer.models.student import load_student
from student_trainer.state import export as exports
from student_trainer.state.checkpoint import latest_checkpoint
from student_trainer.state.export import exported_step
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.telling import asked

LORA = {"kind": "lora", "r": 4, "alpha": 8}
RUNS = {
    "lora": {"train": LORA, "zero": 0},
    "lora-bfloat16": {"train": LORA, "zero": 2, "dtype": "bfloat16"},
    "qlora": {"train": LORA | {"kind": "qlora"}, "zero": 2},
    "qlora-bfloat16": {"train": LORA | {"kind": "qlora"}, "zero": 0, "dtype": "bfloat16"},
    "full": {"train": {"kind": "full"}, "zero": 0},
}
DRILL = "lora-bfloat16"  # lora has its steps, and qlora-bfloat16 its type
ADAPTED = [
    pytest.param(name, marks=[pytest.mark.drill] * (name == DRILL))
    for name in RUNS
    if name != "full"
]
IDS_1T = torch.arange(3, 43)[None]


def needed(request: pytest.FixtureRequest) -> list[str]:
    """Runs that the tests of this session look at."""
    return [name for name in RUNS if name != DRILL or name in asked(request, "name")]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run of every kind; LoRA's heads are tied."""
    folder = tmp_path_factory.mktemp("merge")
    domains, jobs = prepared_domains(folder), []
    pairs = {tied: tiny.save_pair(folder / f"tied-{tied}", tied=tied) for tied in (True, False)}
    for name in needed(request):
        student = RUNS[name]
        plan = plan_of(
            folder / name,
            pairs[name.startswith("lora")],
            domains,
            student=student,
            optimiser={"lr": 5e-2},
        )
        (folder / name / "config.yaml").write_text(dump(plan.config))
        jobs.append(as_job("train", plan))
    for result in run_jobs(jobs, folder / "jobs"):
        assert result["error"] is None
    return folder


@pytest.fixture(scope="module")
def merged(request: pytest.FixtureRequest, runs: Path) -> Path:
    for name in needed(request):
        if name != "full":
            assert main(["export", str(runs / name), "--merge"]) == 0
    return runs


def whole(folder: Path, dtype: str = "float32"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def dequantised(base):
    """The base as nf4 has it, of bitsandbytes alone; the head is not quantised."""
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = quantize_4bit(module.weight.data, quant_type="nf4")
            module.weight.data = dequantize_4bit(codes, state)
    return base


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS_1T, use_cache=False).logits.float()


@pytest.mark.parametrize("name", [*ADAPTED, "full"])
def test_the_trainer_evaluates_what_an_export_holds(runs: Path, name: str) -> None:
    config = RunDir(runs / name).recorded_config()
    export, cpu = runs / name / "export", torch.device("cpu")
    student = load_student(config, CAUSAL_LM.model, device=cpu, export=export)
    assert student.is_adapted == (name != "full")
    probe = np.load(latest_checkpoint(runs / name / "checkpoints") / "probe.npz")
    with torch.no_grad():
        ids_1T = torch.from_numpy(probe["ids"])[None]
        found = student.saved.eval()(input_ids=ids_1T, use_cache=False).logits[0].float().numpy()
    far = np.abs(found - probe["logits"]).max() / np.abs(probe["logits"]).max()
    assert far <= tolerance(config.student.dtype, reordered=True)
    begun = load_student(config, CAUSAL_LM.model, device=cpu).saved.eval()
    with torch.no_grad():
        before = begun(input_ids=ids_1T, use_cache=False).logits[0].float().numpy()
    assert np.abs(before - probe["logits"]).max() / np.abs(probe["logits"]).max() > 3 * far


def test_adapters_that_do_not_fit_are_refused_by_their_folder(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lora" / "export", tmp_path / "export")
    (tmp_path / "export" / "adapter_model.safetensors").write_bytes(b"cut off")
    config = RunDir(runs / "lora").recorded_config()
    with pytest.raises(ConfigError, match=r"the adapters in .*/export cannot be loaded on"):
        load_student(
            config, CAUSAL_LM.model, device=torch.device("cpu"), export=tmp_path / "export"
        )


def bases(runs: Path, name: str):
    """The base that a run's adapters stand on."""
    dtype = RUNS[name].get("dtype", "float32")
    base = whole(runs / f"tied-{name.startswith('lora')}" / "student", dtype)
    return dequantised(base) if name.startswith("qlora") else base


@pytest.mark.parametrize("name", ADAPTED)
def test_merged_weights_are_base_and_adapter_but_for_rounding(merged: Path, name: str) -> None:
    base = dict(bases(merged, name).named_parameters())
    found = load_file(merged / name / "merged" / "model.safetensors")
    adapter = load_file(merged / name / "export" / "adapter_model.safetensors")
    eps = torch.finfo(next(iter(base.values())).dtype).eps
    downs = [key for key in adapter if "lora_A" in key]
    assert len(downs) >= 7
    moved = set()
    for key in downs:
        module = key.removeprefix("base_model.model.").partition(".lora_A")[0]
        down, up = (adapter[k].double() for k in (key, key.replace("lora_A", "lora_B")))
        weight = base[f"{module}.weight"].detach().double()
        scale = LORA["alpha"] / LORA["r"]
        delta, bound = scale * up @ down, scale * up.abs() @ down.abs()
        error = (found[f"{module}.weight"].double() - (weight + delta)).abs()
        rounding = 2 * eps * (weight.abs() + bound)
        assert (error <= rounding).all(), module
        assert (delta.abs() > rounding).any()  # the adapter is of some weight
        moved.add(f"{module}.weight")
    for key in found.keys() - moved:
        assert (found[key] == base[key]).all(), key


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_merged_model_says_what_base_and_adapter_say(merged: Path, name: str) -> None:
    base = bases(merged, name)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(merged / name / "export")).eval())
    found = logits(whole(merged / name / "merged"))
    close = 1e-5 * adapted.abs().max()
    assert (found - adapted).abs().max() <= close
    assert (plain - adapted).abs().max() > 1000 * close


@pytest.mark.parametrize("name", ADAPTED)
def test_the_folder_is_a_plain_model_and_says_what_it_is(merged: Path, name: str) -> None:
    folder = merged / name / "merged"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list(folder.glob("adapter*"))
    weights = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in weights.values()} == {
        f"torch.{RUNS[name].get('dtype', 'float32')}"
    }
    assert not any("lora" in key for key in weights)
    AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "The trained adapter is merged into student" in card
    assert ("dequantised from nf4" in card) == name.startswith("qlora")
    assert f"vllm serve . --dtype {RUNS[name].get('dtype', 'float32')}" in card
    assert f"convert_hf_to_gguf.py FOLDER --outfile {name}.gguf" in card
    assert "tutelage export RUN --merge" in (merged / name / "export" / "README.md").read_text()


def test_a_merged_model_generates(merged: Path) -> None:
    model = whole(merged / "lora" / "merged")
    assert model.generate(IDS_1T, max_new_tokens=4, min_new_tokens=4).shape[1] == 44
    assert model.config.use_cache


def test_a_copy_that_is_interrupted_leaves_nothing(
    merged: Path, tmp_path: Path, monkeypatch
) -> None:
    def interrupted(folder: Path, draft: Path) -> None:
        draft.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.commands.exports.shutil.copytree", interrupted)
    assert main(["export", str(merged / "lora"), "--merge", "--to", str(tmp_path / "new")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_it_is_copied_to_a_folder_that_is_named(merged: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(merged / "lora"), "--merge", "--to", str(tmp_path / "new")]) == 0
    assert f"step 4, merged into its base, is in {tmp_path / 'new'}" in capsys.readouterr().out
    copied = [p for f in (tmp_path / "new", merged / "lora" / "merged") for p in f.iterdir()]
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in copied} == {0o666 & ~mask}
    assert (logits(whole(tmp_path / "new")) == logits(whole(merged / "lora" / "merged"))).all()


def test_a_student_that_trained_whole_has_nothing_to_merge(runs: Path, capsys) -> None:
    assert main(["export", str(runs / "full"), "--merge"]) == 2
    said = capsys.readouterr().err
    assert "student.train.kind is full" in said
    assert "without --merge" in said
    assert not (runs / "full" / "merged").exists()
    assert "vllm serve ." in (runs / "full" / "export" / "README.md").read_text()


@pytest.mark.parametrize("name", ["lora", "qlora-bfloat16"])
def test_a_base_that_has_changed_is_refused(runs: Path, tmp_path: Path, capsys, name: str) -> None:
    run = tmp_path / name
    shutil.copytree(runs / name, run, ignore=shutil.ignore_patterns("merged", "export"))
    base = tmp_path / "base"
    shutil.copytree(runs / f"tied-{name.startswith('lora')}" / "student", base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {key: t * 1.5 for key, t in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    settings = (run / "config.yaml").read_text()
    before = str(runs / f"tied-{name.startswith('lora')}" / "student")
    assert before in settings
    (run / "config.yaml").write_text(settings.replace(before, str(base)))
    assert main(["export", str(run), "--merge"]) == 2
    said = capsys.readouterr().err
    assert f"Is {base} what it was in training?" in said
    assert sorted(p.name for p in run.iterdir() if "merged" in p.name) == []


@pytest.mark.parametrize("name", ["qlora", pytest.param("lora", marks=pytest.mark.drill)])
def test_a_new_python_loads_adapters(runs: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(exports, "FRESH", (sys.executable, "-I", exports.FRESH[-1]))
    shutil.rmtree(runs / name / "export")
    assert main(["export", str(runs / name)]) == 0
    assert exported_step(runs / name / "export") == 4


def test_a_damaged_checkpoint_is_refused(runs: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "broken"
    shutil.copytree(runs / "lora", run, ignore=shutil.ignore_patterns("merged", "export"))
    for path in (run / "checkpoints").rglob("adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4])
    assert main(["export", str(run), "--merge"]) == 2
    assert "checkpoints" in capsys.readouterr().err
    assert not (run / "merged").exists()
