"""A copy of the student answers the fixed text as the student's workers do."""

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cluster.rollouts.engine import load_engine
from shared.config.file import load_config, resolve
from shared.targets.canary import COARSE_LEVEL
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.weights import CANARY, WeightFiles, WeightsRef
from student_trainer.models.probing import label_logprobs
from student_trainer.models.student import load_student
from student_trainer.objective import Objective
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.cluster.jobs import write_job

IDS = torch.arange(32) * 5 % tiny.VOCAB


def test_a_student_in_16_bits_that_is_sure_is_answered_for_as_its_workers_do(tmp_path, tiny_pair):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    model.save_pretrained(tmp_path / "sure")
    tiny.save_tokenizer(tmp_path / "sure")
    pair = tiny.Pair(tiny_pair.teacher, tmp_path / "sure")
    source = {"student": 1.0, "max_new_tokens": 8}
    changed = {"source": source, "rollouts": {"replicas": 1}}
    student = {"model": str(pair.student), "cpus": 0.5, "zero": 0, "dtype": "bfloat16"}
    config = resolve(load_config(write_job(tmp_path, pair, student=student, **changed)))

    worker = load_student(config, CAUSAL_LM.model, device=torch.device("cpu"))
    objective = Objective(worker, config, teacher_width=None).eval()
    place = torch.arange(len(IDS))
    text = {"input_ids_BT": IDS[None], "position_ids_BT": place[None], "loss_index_N": place}
    with torch.no_grad():
        (logits_TV,) = objective(text, mode="logits")
        rounded_TV = worker.saved(input_ids=IDS[None]).logits[0]
    own_T = label_logprobs(IDS, logits_TV)
    assert np.abs(label_logprobs(IDS, rounded_TV) - own_T).max() > COARSE_LEVEL

    files = WeightFiles(tmp_path / "weights")
    files.folder.mkdir()
    head = {"model.norm.weight": worker.saved.state_dict()["model.norm.weight"]}
    save_file(head, files.path(0), metadata={CANARY: json.dumps({"ids": IDS.tolist()})})
    spec = GenerationSpec(2, weights=WeightsRef(0, files.digest(0)))
    openings = Openings.build(names=["a"], input_ids=[IDS[:4].numpy()])
    answer = load_engine(config, str(files.folder)).generate(openings, spec)
    (found_T,) = answer.canaries()
    np.testing.assert_allclose(found_T, own_T, atol=1e-5)
