"""A probe of a teacher that is spread over two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.probing.following import Chunks
from cluster.probing.teacher import ProbedEngine
from cluster.sizing.measured import Probe, read
from teacher_service.engine.hf import HFEngine
from tests.answers import question_of
from tests.teacher_service.ranks import Ranks
from tests.teacher_service.scripted import VOCAB, make_rows
from tests.teacher_service.teachers import save_family

UNITS = ([20, 9, 5], [31], [2, 9])


def probed(folder: str, to: str) -> dict[str, Any]:
    """What one process counts while units are scored and the head is put together."""
    engine = HFEngine.load(folder, tensor_parallel=2)
    name = f"teacher-one-{torch.distributed.get_rank()}.json"
    counted = ProbedEngine(engine, torch.device("cpu"), Chunks((VOCAB,), 32, 8), Path(to) / name)
    for lengths in UNITS:
        counted.score(make_rows([lengths], vocab=VOCAB), question_of(7, VOCAB))
    counted.head.whole()
    return json.loads((Path(to) / name).read_text())


@pytest.mark.drill
def test_each_process_counts_its_part_and_one_answers_for_the_replica(tmp_path):
    folder = str(save_family("llama", tmp_path / "model"))
    ranks = Ranks(2)
    try:
        first, second = ranks.call(probed, folder, str(tmp_path))
    finally:
        ranks.close()
    whole = sum(tensor.nbytes for tensor in load_file(f"{folder}/model.safetensors").values())
    parts = [found["memory"]["parts"]["weights"] for found in (first, second)]
    assert parts[0] == parts[1]
    assert whole / 2 < parts[0] < whole  # norms, and here the embedding, are in both
    assert all(found["memory"]["parts"]["activations and loss"] > 0 for found in (first, second))
    probe: Probe = read(tmp_path, ["one"], num_steps=2)
    assert len(probe.teachers["one"]) == 2
    assert [one.leads for one in probe.teachers["one"]] == [True, False]
    assert probe.teacher_s("one") == pytest.approx(first["seconds"] / first["timed"] * 3 / 2)
    assert first["timed"] + first["followed"] == len(UNITS)
