"""A student in vLLM itself writes with the weights that its trainer pushes, and a run ends with the
same weights whoever is killed.

T tokens of a text
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.rollouts.engine import load_engine
from shared.config.file import load_config, resolve
from shared.run.metrics import read_metrics
from shared.targets.generation import GenerationSpec
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import Student, load_student
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.cluster.jobs import write_job
from tests.drills.commands import Command, Home, reached, titled, wait_until
from tests.drills.conftest import homes
from tests.drills.evidence import assert_same, failures
from tests.engines.subjects import Plain, openings

pytestmark = pytest.mark.drill

LEVEL = 1e-3  # nats, of a version's fixed text
SPEC = GenerationSpec(8, temperature=0.7, top_p=0.9, logprobs=True, seed=11)
IDS = torch.arange(16) * 5 % tiny.VOCAB
LORA = {"kind": "lora", "r": 4, "alpha": 12}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tiny.Pair:
    """Heads of a width that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("wide")
    found = tiny.Pair(folder / "teacher", folder / "student")
    tiny.save_model(found.teacher, width=48, layers=3, seed=1)
    tiny.save_model(found.student, width=128, layers=2, seed=2)
    return found


def job_of(folder: Path, pair: tiny.Pair, python: Path, train: dict[str, Any], **parts: Any):
    """A config whose student is held by vLLM where it writes."""
    return write_job(
        folder,
        pair,
        student={"model": str(pair.student), "cpus": 0.25, "zero": 0, "train": train},
        teachers={"tiny": {"model": str(pair.teacher), "cpus": 0.25}},
        source={"student": 0.5, "dataset": 0.5, "max_new_tokens": 8, "prompt_tokens": 4},
        rollouts={"replicas": 1, "cpus": 0.25, "engine": "vllm", "python": str(python)},
        **parts,
    )


def pushed(student: Student, files: WeightFiles, version: int) -> tuple[WeightsRef, np.ndarray]:
    """A version whose weights moved, and the student's own log-probabilities of its text."""
    model: Any = student.saved.eval()
    torch.manual_seed(version)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05 * torch.randn_like(weight))
        own_T = label_logprobs(IDS, model(input_ids=IDS[None]).logits[0])
    text = {CANARY: json.dumps({"ids": IDS.tolist()})}
    given = {name: p.detach() for name, p in trained.items()}
    ref = files.write(version, lambda path: save_file(given, path, metadata=text))
    return ref, own_T


@pytest.mark.parametrize("train", [{"kind": "full"}, LORA], ids=["full", "lora"])
def test_a_version_is_held_and_written_with(ray_cluster, tmp_path, pair, vllm_python, train):
    """One after the other, and the first again: the fixed text is answered for, and the kept
    log-probabilities are those of the law that is drawn from."""
    config = resolve(load_config(job_of(tmp_path, pair, vllm_python, train)))
    files = WeightFiles(tmp_path / "weights")
    engine = load_engine(config, str(files.folder))
    student = load_student(config, CAUSAL_LM.model, device=torch.device("cpu"))
    asked = openings(5, 17, 9, 2)
    held: list[tuple[WeightsRef, np.ndarray]] = []
    for version in (0, 1):
        ref, own_T = pushed(student, files, version)
        held.append((ref, own_T))
        found = engine.generate(asked, replace(SPEC, weights=ref))
        np.testing.assert_allclose(found.canaries()[0], own_T, atol=LEVEL)
        plain = _plain(student, tmp_path / f"merged-{version}")
        for ids, written, logprobs in zip(
            asked.ids(), found.written(), found.logprobs(), strict=True
        ):
            p_WV = plain.law(ids, written, temperature=0.7, top_p=0.9)
            expected = np.log(p_WV[np.arange(len(written)), written])
            np.testing.assert_allclose(logprobs, expected, atol=LEVEL)
    assert np.abs(held[0][1] - held[1][1]).max() > 10 * LEVEL
    ref, own_T = held[0]
    np.testing.assert_allclose(
        engine.generate(asked, replace(SPEC, weights=ref)).canaries()[0], own_T, atol=LEVEL
    )


def _plain(student: Student, folder: Path) -> Plain:
    """The student read in plain forward passes, its adapters merged."""
    model: Any = student.saved
    if not student.is_adapted:
        model.save_pretrained(folder)
        return Plain(folder)
    model.merge_adapter()
    weights = {
        name.replace("base_layer.", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name
    }
    model.get_base_model().config.save_pretrained(folder)
    save_file({name: t.clone() for name, t in weights.items()}, folder / "model.safetensors")
    model.unmerge_adapter()
    return Plain(folder)


@pytest.fixture
def home():
    yield from homes()


def test_driver_and_the_process_of_vllm_killed_change_no_weight(
    home: Home, tmp_path, pair, vllm_python
):
    """The run that nobody disturbed is written by vLLM too."""
    more = {"steps": 20, "log_every": 1, "checkpoints": {"every": 4}}
    config = job_of(tmp_path, pair, vllm_python, {"kind": "full"}, **more)
    runs = tmp_path / "undisturbed", tmp_path / "killed"
    for ready in homes():
        ready.run("run", str(config), f"paths.runs={runs[0]}")
    run, asked = runs[1] / "job", ("run", str(config), f"paths.runs={runs[1]}")
    first = home.start(*asked)
    wait_until(reached(run, 6), doing=first)
    first.kill_everything()
    second = home.start(*asked)
    wait_until(reached(run, 10), doing=second)
    _process_of_vllm(second).kill()
    assert second.wait() == 0, second.output
    assert_same(run, runs[0] / "job")
    assert failures(run)["rollout_restarts"] == 1
    lines = read_metrics(run / "metrics.jsonl")
    assert all(line.rollouts and line.rollouts.rollouts and line.pushed_bytes for line in lines)
    assert len(load_file(run / "export" / "model.safetensors"))
    assert not home.processes()


def _process_of_vllm(command: Command):
    (found,) = titled(command.family(), "VllmWorker")
    return found
