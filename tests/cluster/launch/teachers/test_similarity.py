"""A run's soft labels come from its training rows, as the model's own tokenizer has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.commands import teachers
from cluster.launch.capture import capture
from cluster.launch.teachers.similarity import with_similarity
from cluster.planning.preparation import Launch, prepare_run, run_plan
from shared.config.run import Config
from shared.errors import ConfigError
from shared.run.run_dir import RunDir
from shared.targets.asks.classes import SoftLabels
from teacher_service.engine.classes.similarity import codes_of, similarities, soft_labels
from teacher_service.engine.classes.soft_labels import SoftLabelEngine
from tests import tiny
from tests.student_trainer.tasks.classified import LABELS, config_of, save_bert

DIAGONAL = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_pair(folder)
    save_bert(folder / "own", own_tokenizer=True)
    return folder


def asked(
    folder: Path, models: Path, *, teacher: dict[str, Any] | None = None, **options
) -> Config:
    own = {"model": str(models / "teacher"), "engine": "similarity", **(teacher or {})}
    own.setdefault("similarity", {"diagonal": DIAGONAL, "passes": 3})
    student = {"model": str(models / "own"), "workers": 1}
    sections = {"teachers": {"t": own}, "student": student, "task": {"template": "{text}"}}
    return config_of(folder, "run", models=models, **(sections | options))


def launched(config: Config) -> Launch:
    folder = RunDir(Path(config.paths.runs) / config.name)
    return Launch(prepare_run(config), folder, folder.path, None)


def labels_of(config: Config) -> np.ndarray:
    """Probabilities [C, C] of the engine that a run's teacher would have."""

    def none() -> Any:
        raise AssertionError("no model is served")

    engine = with_similarity(launched(config), none)()
    assert isinstance(engine, SoftLabelEngine)
    assert engine.classes == LABELS
    return engine.label_CC


def by_hand(config: Config, models: Path) -> np.ndarray:
    """From the files, through transformers."""
    paths = [Path(str(domain.train)) for domain in config.domains.values()]
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    with torch.no_grad():
        means = [
            model.get_input_embeddings()(torch.tensor(tokenizer(row["text"])["input_ids"])).mean(0)
            for row in rows
        ]
    codes_NE = codes_of(torch.stack(means), epochs=3, seed=config.seed)
    label_N = np.array([LABELS.index(row["label"]) for row in rows])
    options = {"num_classes": 3, "samples": 40, "seed": config.seed}
    alike_CC = similarities(codes_NE, label_N, **options)
    return soft_labels(alike_CC, diagonal=DIAGONAL, classes=LABELS, option="o")


def test_they_are_those_of_the_training_rows_and_are_kept(tmp_path, models, monkeypatch):
    config = asked(tmp_path, models)
    found_CC = labels_of(config)
    np.testing.assert_allclose(found_CC, by_hand(config, models), rtol=0, atol=1e-7)
    monkeypatch.delattr(transformers, "AutoModel")
    assert np.array_equal(labels_of(config), found_CC), "from the cache"


SIMILARITY = [{"samples": 3}, {"passes": 9}, {"diagonal": 0.7}]


@pytest.mark.parametrize("option", SIMILARITY, ids=str)
def test_every_option_changes_them(tmp_path, models, option):
    base = {"diagonal": DIAGONAL, "passes": 3}
    plain, other = (
        labels_of(asked(tmp_path / name, models, teacher={"similarity": base | changed}))
        for name, changed in (("plain", {}), ("other", option))
    )
    assert np.abs(plain - other).max() > 1e-4


def test_a_run_asks_for_them_in_training_alone(tmp_path, models):
    prepared = prepare_run(asked(tmp_path, models))
    plan = run_plan(prepared, run_dir=tmp_path, teacher={"model": "t"})
    assert plan.training_question is not None
    assert plan.training_question.ask == SoftLabels(LABELS)
    assert plan.validation_question is None, "they would tell the class of a validation row"
    assert plan.kl_kind == "none"


def test_a_class_that_is_not_told_apart_or_has_one_row_is_refused(tmp_path, models):
    with pytest.raises(ConfigError, match=r"teachers.t.similarity.diagonal is 0, with which rows"):
        labels_of(asked(tmp_path, models, teacher={"similarity": {"diagonal": 0.0, "passes": 1}}))
    rows = [("a b", "x"), ("c d", "x"), ("e f", "y")]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "g h", "label": "x"}) + "\n")
    domains = {"few": {"train": str(path), "validation": str(held)}}
    with pytest.raises(ConfigError, match="class y has 1 training row, and engine similarity"):
        with_similarity(launched(asked(tmp_path / "few", models, domains=domains)), lambda: None)


def test_what_is_no_run_has_no_rows_for_them(tmp_path, models):
    store = {"store": str(tmp_path / "store")}
    config = asked(tmp_path, models, targets=store)
    with pytest.raises(ConfigError, match="and a capture has none; call `tutelage run`"):
        capture(config)
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    with pytest.raises(ConfigError, match="and a service that outlives a run has none; call"):
        teachers.up(path, [])


CONTRADICTIONS = [
    ({"task": "language_model", "losses": [{"kind": "forward_kl"}]}, "set task=classification"),
    ({"mixture": {"policy": "ddk"}}, "mixture.policy is ddk, which compares with a teacher; take"),
    (
        {"targets": {"store": "s", "teacher_free": True}},
        "targets.teacher_free is set, and there is no teacher to be without; leave it out",
    ),
    ({"teacher": {"gpus": 1}}, "gpus is 1.0, of teachers that are models; leave it out"),
    ({"teacher": {"adapter": "a"}}, "adapter is a, of teachers that are models; leave it out"),
    (
        {"teacher": {"engine": "transformers", "similarity": {"samples": 3}}},
        "similarity is set, but engine is transformers; set engine=similarity, or leave it out",
    ),
]


@pytest.mark.parametrize(("options", "said"), CONTRADICTIONS)
def test_what_does_not_go_with_them_is_refused(tmp_path, models, options, said):
    with pytest.raises(ValidationError) as raised:
        asked(tmp_path, models, **options)
    assert said in str(raised.value)
