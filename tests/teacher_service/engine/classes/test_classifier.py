"""A sequence classifier's word on classes is that of transformers on each text by itself.

P rows   C classes
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.config.models.teachers import Teacher
from shared.data.rows import Rows
from shared.errors import ConfigError, EngineError, HandshakeError
from shared.targets.asks.classes import HeadLogProbs
from shared.targets.canary import Canary
from shared.targets.generation import GenerationSpec, Openings
from shared.targets.question import Question
from teacher_service.engine.classes import classifier
from teacher_service.engine.classes.classifier import ClassifierEngine
from teacher_service.engine.opening import open_engine
from tests.student_trainer.tasks import classified
from tests.student_trainer.tasks.classified import LABELS

TEXTS = ("def name", "return self value if not name", "import list", "class value name list if not")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers: one that reads both ways by a tokenizer of its own, one that reads onwards."""
    folder = tmp_path_factory.mktemp("models")
    classified.save_models(folder)
    for name, base in (("both", "own"), ("onwards", "student")):
        classified.save_classifier(folder / name, folder / base, LABELS)
    return folder


def opened(folder: Path, **options) -> ClassifierEngine:
    engine = open_engine(Teacher(model=str(folder), **options), cache=None, context=None)
    assert isinstance(engine, ClassifierEngine)
    return engine


def rows_of(ids: Sequence[Sequence[int]]) -> Rows:
    return Rows.build(
        domains=["kinds"] * len(ids),
        indices=range(len(ids)),
        input_ids=[[*text, n % len(LABELS)] for n, text in enumerate(ids)],
        doc_starts=[np.zeros(1)] * len(ids),
        loss_masks=[[0] * (len(text) - 1) + [1, 0] for text in ids],
    )


@pytest.mark.parametrize("name", ["both", "onwards"])
def test_classes_are_those_of_transformers_in_the_order_asked_for(models, name, monkeypatch):
    engine, tokenizer = opened(models / name), AutoTokenizer.from_pretrained(models / name)
    model = AutoModelForSequenceClassification.from_pretrained(models / name).double().eval()
    ids = tokenizer(list(TEXTS))["input_ids"]
    asked = (LABELS[2], LABELS[0], LABELS[1])
    with torch.no_grad():
        logits_PC = torch.cat([model(input_ids=torch.tensor([text])).logits for text in ids])
    expected_PC = logits_PC.log_softmax(1)[:, [2, 0, 1]]
    assert expected_PC.exp().max(1).values.std() > 0.01, "the classes are told apart"
    rows, question = rows_of(ids), Question(HeadLogProbs(asked))
    for at_once in (classifier.TOKENS_AT_ONCE, 1):
        monkeypatch.setattr(classifier, "TOKENS_AT_ONCE", at_once)
        answer = engine.score(rows, question)
        answer.check(rows, question, engine.fingerprint)
        arrays = answer.arrays()
        np.testing.assert_allclose(
            arrays.kept["class_logprobs_NC"], expected_PC, rtol=1e-5, atol=1e-5
        )
        own_P = expected_PC[range(len(ids)), [n % len(LABELS) for n in range(len(ids))]]
        np.testing.assert_allclose(arrays.label_logprob_N, own_P, rtol=1e-5, atol=1e-5)


def test_a_classifier_whose_head_says_nothing_is_not_learnt_from(models, tmp_path):
    engine = opened(models / "both")
    watched = Canary(engine.score, "it", engine.describe().vocab_rows, classes=engine.classes)
    watched.begin()
    for path in (models / "both").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    empty = {n: torch.zeros_like(w) if "classifier" in n else w for n, w in weights.items()}
    save_file(empty, tmp_path / "model.safetensors", metadata={"format": "pt"})
    flat = opened(tmp_path)
    watched = Canary(flat.score, "it", flat.describe().vocab_rows, classes=flat.classes)
    with pytest.raises(EngineError, match=r"every class of a fixed text the log-prob.* -1\.09"):
        watched.begin()


def test_what_a_classifier_never_answers_is_refused(models, tmp_path):
    engine = opened(models / "both")
    with pytest.raises(ConfigError, match=r"tells the classes ask, ask again, tell apart"):
        engine.score(rows_of([[5, 6]]), Question(HeadLogProbs(("yes", "no"))))
    assert engine.max_context is not None
    with pytest.raises(HandshakeError, match=r"kinds/0 has 65 tokens and the teacher's context"):
        engine.score(rows_of([[5] * (engine.max_context + 1)]), Question(HeadLogProbs(LABELS)))
    with pytest.raises(HandshakeError, match="holds token id 9999"):
        engine.score(rows_of([[5, 9999]]), Question(HeadLogProbs(LABELS)))
    with pytest.raises(ConfigError, match="a classifier, which writes no text"):
        engine.generate(Openings.build(names=["d"], input_ids=[[5]]), GenerationSpec(4))
    with pytest.raises(ConfigError, match="whose head gives no tokens"):
        engine.ship_head()
    several = tmp_path / "several"
    shutil.copytree(models / "both", several)
    told = json.loads((several / "config.json").read_text())
    told["problem_type"] = "multi_label_classification"
    (several / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="says of each class by itself whether a text has it"):
        opened(several)
    for option, value in (("quantisation", "nf4"), ("tensor_parallel", 2), ("adapter", "a")):
        with pytest.raises(ConfigError, match=f"a classifier, and {option} is {value}"):
            opened(models / "both", **{option: value})
