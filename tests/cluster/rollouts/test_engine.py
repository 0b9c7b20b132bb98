"""A copy of the student answers the fixed text as the student's workers do."""

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cluster.rollouts.engine import load_engine
from shared.config.file import load_config, resolve
from shared.errors import DamagedError, TeacherError
from shared.targets.canary import COARSE_LEVEL
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import load_student
from student_trainer.objective import Objective
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.cluster.jobs import write_job
from tests.families.making import save_family

IDS = torch.arange(32) * 5 % tiny.VOCAB


def copy_of(folder, pair: tiny.Pair, dtype: str = "float32"):
    """A config whose student is written for by copies, with a folder of versions, the version of
    the student as it begins in it, and what names that."""
    source = {"student": 1.0, "max_new_tokens": 8}
    changed = {"source": source, "rollouts": {"replicas": 1}}
    student = {"model": str(pair.student), "cpus": 0.5, "zero": 0, "dtype": dtype}
    config = resolve(load_config(write_job(folder, pair, student=student, **changed)))
    files = WeightFiles(folder / "weights")
    files.folder.mkdir()
    model: Any = AutoModelForCausalLM.from_pretrained(pair.student)
    head = {"model.norm.weight": model.state_dict()["model.norm.weight"]}
    save_file(head, files.path(0), metadata={CANARY: json.dumps({"ids": IDS.tolist()})})
    return config, files, WeightsRef(0, files.digest(0))


OPENINGS = Openings.build(names=["a"], input_ids=[IDS[:4].numpy()])


def test_a_caps_and_scales_logits_are_answered_for_too(tmp_path, tiny_pair):
    """As transformers has them."""
    family = save_family("gemma2", tmp_path / "gemma2", seed=3)
    tiny.edit_config(family, final_logit_softcapping=0.5)
    config, files, ref = copy_of(tmp_path, tiny.Pair(tiny_pair.teacher, family))
    answer = load_engine(config, str(files.folder)).generate(
        OPENINGS, GenerationSpec(2, weights=ref)
    )
    model: Any = AutoModelForCausalLM.from_pretrained(family)
    with torch.no_grad():
        logits_TV = model(input_ids=IDS[None]).logits[0]
    assert logits_TV.abs().max() <= 0.5
    np.testing.assert_allclose(answer.canaries()[0], label_logprobs(IDS, logits_TV), atol=1e-5)


def test_a_version_is_waited_for_and_a_damaged_one_is_not_held(tmp_path, tiny_pair, monkeypatch):
    config, files, ref = copy_of(tmp_path, tiny_pair)
    engine, spec = load_engine(config, str(files.folder)), GenerationSpec(2, weights=ref)
    aside = files.path(0).rename(tmp_path / "aside")
    arriving = threading.Timer(0.5, aside.rename, [files.path(0)])
    arriving.start()
    first = engine.generate(OPENINGS, spec)  # seen half a second later
    arriving.join()

    other = WeightsRef(1, ref.digest)
    files.path(1).write_bytes(files.path(0).read_bytes() + b" ")
    with pytest.raises(DamagedError, match="is not what was pushed as version 1"):
        engine.generate(OPENINGS, GenerationSpec(2, weights=other))
    monkeypatch.setattr("teacher_service.engine.weights.ARRIVAL_S", 0.3)
    with pytest.raises(TeacherError, match=r"version 2 .* was not seen in .* within 0.3 s"):
        engine.generate(OPENINGS, GenerationSpec(2, weights=WeightsRef(2, ref.digest)))
    assert engine.generate(OPENINGS, spec).ids()[0].tolist() == first.ids()[0].tolist()


def test_a_student_in_16_bits_that_is_sure_is_answered_for_as_its_workers_do(tmp_path, tiny_pair):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    model.save_pretrained(tmp_path / "sure")
    tiny.save_tokenizer(tmp_path / "sure")
    pair = tiny.Pair(tiny_pair.teacher, tmp_path / "sure")
    config, files, ref = copy_of(tmp_path, pair, "bfloat16")

    worker = load_student(config, CAUSAL_LM.model, device=torch.device("cpu"))
    objective = Objective(worker, config, teacher_width=None).eval()
    place = torch.arange(len(IDS))
    text = {"input_ids_BT": IDS[None], "position_ids_BT": place[None], "loss_index_N": place}
    with torch.no_grad():
        (logits_TV,) = objective(text, mode="logits")
        rounded_TV = worker.saved(input_ids=IDS[None]).logits[0]
    own_T = label_logprobs(IDS, logits_TV)
    assert np.abs(label_logprobs(IDS, rounded_TV) - own_T).max() > COARSE_LEVEL

    spec = GenerationSpec(2, weights=ref)
    answer = load_engine(config, str(files.folder)).generate(OPENINGS, spec)
    (found_T,) = answer.canaries()
    np.testing.assert_allclose(found_T, own_T, atol=1e-5)
