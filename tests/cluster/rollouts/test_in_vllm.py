"""A copy of the student in vLLM writes with the versions that the student pushes, as one in
transformers does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.rollouts.engine import load_engine
from shared.config.file import load_config, resolve
from shared.config.run import Config
from shared.errors import ConfigError, TeacherError
from shared.targets.canary import is_flat
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from student_trainer.models.student import load_student
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.cluster.jobs import write_job
from tests.engines.plain_worker import PlainWorker

IDS = np.arange(16) * 5 % tiny.VOCAB
OPENINGS = Openings.build(names=["a", "b"], input_ids=[IDS[:4], IDS[3:12]]).with_draws("ab")
IN_VLLM = {"engine": "vllm", "python": "/vllm/bin/python"}
TRAINED = {"full": {"kind": "full"}, "lora": {"kind": "lora", "r": 4, "alpha": 12}}


def config_of(folder: Path, pair: tiny.Pair, train: str, **rollouts: object) -> Config:
    student = {"model": str(pair.student), "cpus": 0.5, "train": TRAINED[train]}
    job = write_job(
        folder,
        pair,
        student=student,
        source={"student": 1.0, "max_new_tokens": 8},
        rollouts={"replicas": 1, **rollouts},
    )
    return resolve(load_config(job))


def started(monkeypatch) -> list[PlainWorker]:
    """The workers that take the place of vLLM's process, as each is started."""
    workers: list[PlainWorker] = []

    def start(teacher, *, section: str) -> PlainWorker:
        assert (section, teacher.python) == ("rollouts", "/vllm/bin/python")
        workers.append(PlainWorker(Path(teacher.model)))
        return workers[0]

    monkeypatch.setattr("teacher_service.service.replicas.environments.Worker", start)
    return workers


def pushed(config: Config, files: WeightFiles, version: int) -> WeightsRef:
    """A version of weights, all that train moved, as the trainer names them."""
    model = load_student(config, CAUSAL_LM.model, device=torch.device("cpu")).saved
    torch.manual_seed(version)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moved = {name: p + 0.1 * torch.randn_like(p) for name, p in trained.items()}
    metadata = {CANARY: json.dumps({"ids": IDS.tolist()})}
    return files.write(version, lambda path: save_file(moved, path, metadata=metadata))


@pytest.mark.parametrize("train", TRAINED)
def test_it_writes_with_each_version_what_a_copy_in_transformers_writes(
    tmp_path, tiny_pair, monkeypatch, train
):
    """All weights, or adapters on the model, of one version after the other."""
    workers = started(monkeypatch)
    config = config_of(tmp_path, tiny_pair, train, **IN_VLLM)
    files = WeightFiles(tmp_path / "weights")
    engine = load_engine(config, str(files.folder))
    own = load_engine(config_of(tmp_path, tiny_pair, train), str(files.folder))
    assert not engine.describe().watched
    canaries = []
    for version in (0, 1):
        spec = GenerationSpec(8, logprobs=True, weights=pushed(config, files, version))
        found, expected = (each.generate(OPENINGS, spec) for each in (engine, own))
        found.check(OPENINGS, spec, engine.describe().fingerprint)
        assert [ids.tolist() for ids in found.ids()] == [ids.tolist() for ids in expected.ids()]
        for one, other in zip(found.canaries(), expected.canaries(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert not is_flat(one)
        canaries.append(found.canaries()[0])
    assert np.abs(canaries[0] - canaries[1]).max() > 1e-3
    with pytest.raises(ConfigError, match="is asked to write without a version"):
        engine.generate(OPENINGS, GenerationSpec(8))
    assert workers[0].settings.get("max_lora_rank") == (8 if train == "lora" else None)


def test_weights_that_it_does_not_take_are_refused_with_what_to_change(
    tmp_path, tiny_pair, monkeypatch
):
    workers, files = started(monkeypatch), WeightFiles(tmp_path / "weights")
    config = config_of(tmp_path, tiny_pair, "lora", **IN_VLLM)
    engine, ref = load_engine(config, str(files.folder)), pushed(config, files, 3)

    def refuse(file: str, adapters: dict) -> None:
        raise TeacherError("ValueError: expected target modules in ['q_proj']")

    monkeypatch.setattr(workers[0], "load_adapters", refuse)
    with pytest.raises(ConfigError, match=r"does not take .* of version-000003.*q_proj.*change"):
        engine.generate(OPENINGS, GenerationSpec(8, weights=ref))


def test_its_own_python_is_looked_for_on_its_node(tmp_path, tiny_pair):
    python = str(tmp_path / "python")
    config = config_of(tmp_path, tiny_pair, "full", engine="vllm", python=python)
    with pytest.raises(ConfigError, match=f"rollouts.python is {python}, which is no program"):
        load_engine(config, str(tmp_path))
