"""What a quantised teacher reports about itself."""

import os
import re
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.config.models.teachers import Teacher
from teacher_service.engine import audit
from teacher_service.engine.hf import HFEngine
from teacher_service.engine.loading import weights_digest
from tests.answers import question_of
from tests.student_trainer.models.test_adapters import save as save_mixture
from tests.teacher_service.scripted import make_rows
from tests.telling import telling
from tests.tiny import VOCAB

CHANCE = 100 / VOCAB  # percent; four bits leave little of random weights


@pytest.mark.parametrize(
    ("dtype", "quantisation"),
    telling(product(["float32", "bfloat16"], ["int8", "nf4"]), ("bfloat16", "nf4")),
)
def test_a_quantised_teacher_scores_and_says_what_it_costs(
    tiny_pair, tmp_path, quantisation, dtype
):
    teacher = Teacher(model=str(tiny_pair.teacher), quantisation=quantisation, dtype=dtype)
    engine = audit.load_engine(teacher, cache=str(tmp_path))
    note = re.search(r"KL of (\S+) nats .* at (\S+)% of (\d+) probe", engine.notes[-1])
    assert note is not None
    kl, agreement, tokens = map(float, note.groups())
    assert 0 < kl < 2
    assert CHANCE < agreement <= 100
    assert tokens > 300
    rows, spec = make_rows([[20, 30], [7]], vocab=VOCAB), question_of(8, VOCAB)
    answer = engine.score(rows, spec)
    answer.check(rows, spec, engine.fingerprint)
    assert answer.table.equals(engine.score(rows, spec).table)
    assert engine.fingerprint["quantisation"] == quantisation


def test_what_rows_change_about_each_other_is_said(tiny_pair, tmp_path):
    """An outlier in one column sends it, for all rows of a unit, past the eight bits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    folder = tmp_path / "model"
    shutil.copytree(tiny_pair.teacher, folder)
    model.save_pretrained(folder)
    teacher = Teacher(model=str(folder), quantisation="int8")
    engine = audit.load_engine(teacher)
    said = next(note for note in engine.notes if "rows beside it" in note)
    rows = audit.probe_rows(teacher).part(slice(0, 4))
    alone = torch.cat([engine.last_hidden(rows.part(slice(r, r + 1))) for r in range(4)])
    kl_N, _ = audit.divergence(alone, engine.last_hidden(rows), engine.head)
    assert f"KL of {float(kl_N.mean()):.4f} nats per token, {float(kl_N.max()):.2f}" in said
    nf4 = audit.load_engine(teacher.model_copy(update={"quantisation": "nf4"}))
    assert not any("rows beside it" in note for note in nf4.notes)


@pytest.mark.parametrize("quantisation", telling(["int8", "nf4"], "nf4"))
def test_how_much_is_quantised_is_said(tmp_path, quantisation):
    save_mixture(tmp_path / "model", "mixtral")
    teacher = Teacher(model=str(tmp_path / "model"), quantisation=quantisation)
    notes = " ".join(audit.load_engine(teacher).notes)
    assert f"8 matrices of the teacher are in {quantisation}, 6,144 of 76,192 weights" in notes
    assert "4 fused expert tensors (36,864 weights) stay unquantised" in notes


def test_the_unquantised_weights_are_loaded_once_per_model(tiny_pair, tmp_path, monkeypatch):
    loads, load = [], HFEngine.load
    monkeypatch.setattr(
        HFEngine, "load", lambda *a, **k: loads.append(k["quantisation"]) or load(*a, **k)
    )
    teacher = Teacher(model=str(tiny_pair.teacher), quantisation="int8")
    notes = [audit.load_engine(teacher, cache=str(tmp_path)).notes for _ in range(2)]
    assert loads == ["none", "int8", "int8"]
    assert notes[0] == notes[1]


def test_the_divergence_is_the_dense_kl(tiny_pair):
    engine = HFEngine.load(str(tiny_pair.teacher))
    rows = audit.probe_rows(Teacher(model=str(tiny_pair.teacher)))
    reference_ND = engine.last_hidden(rows)
    other_ND = reference_ND + 0.1 * torch.randn(
        reference_ND.shape, generator=torch.Generator().manual_seed(0)
    )
    kl_N, same_N = audit.divergence(reference_ND, other_ND, engine.head)
    p_NV, q_NV = (
        (h.double() @ engine.head.weight_VD.double().T).log_softmax(1)
        for h in (reference_ND, other_ND)
    )
    expected_N = torch.nn.functional.kl_div(q_NV, p_NV, reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(kl_N, expected_N, atol=1e-5)
    assert torch.equal(same_N, p_NV.argmax(1) == q_NV.argmax(1))
    assert float(audit.divergence(reference_ND, reference_ND, engine.head)[0].abs().max()) == 0


@pytest.mark.drill
@pytest.mark.parametrize(
    ("quantisation", "most_kl", "least"), [("int8", 2e-3, 96), ("nf4", 3e-2, 85)]
)
def test_a_trained_teacher_survives_quantisation(reference, quantisation, most_kl, least):
    folder = str(reference / "models" / "teacher-6m")
    note = audit.load_engine(Teacher(model=folder, quantisation=quantisation)).notes[-1]
    kl, agreement = re.search(r"KL of (\S+) nats .* at (\S+)%", note).groups()
    assert 0 < float(kl) < most_kl
    assert float(agreement) > least


def test_a_process_reads_a_models_files_once_for_their_digest(tmp_path):
    """While size and time say that they are as they were."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    first, told = weights_digest(tmp_path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert weights_digest(tmp_path) == first
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    second = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({first, second, weights_digest(tmp_path)}) == 3
