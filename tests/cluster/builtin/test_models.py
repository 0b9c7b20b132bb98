"""The embedded models are built once, safely, and stand behind their `builtin:` names."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.builtin import corpus, models, training
from cluster.builtin.corpus import DOMAINS
from cluster.builtin.models import build_model, build_tokenizer, plans, resolve_builtin
from cluster.builtin.training import ModelPlan
from shared.config.run import Config
from shared.errors import ConfigError

TINY = {"width": 32, "layers": 1, "heads": 2, "steps": 3, "rows_per_step": 2, "context": 32}
TINY_PLANS = {
    "teacher": ModelPlan(domains=DOMAINS, **TINY),
    "student": ModelPlan(domains=("python",), seed=1, **TINY),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(corpus, "MAX_BYTES", {"train": 90_000, "validation": 9_000})
    monkeypatch.setattr(models, "plans", lambda: TINY_PLANS)


def config_of(cache: Path, **changes) -> Config:
    fields = {
        "name": "demo",
        "steps": 1,
        "paths": {"cache": str(cache)},
        "teachers": {"main": {"model": "builtin:teacher"}},
        "student": {"model": "builtin:student"},
        "domains": {name: {"train": f"builtin:{name}"} for name in DOMAINS},
    }
    return Config.model_validate(fields | changes)


def test_builtin_names_become_paths_that_load(cache: Path):
    config = resolve_builtin(config_of(cache))
    teacher = AutoModelForCausalLM.from_pretrained(config.teachers["main"].model)
    student = AutoModelForCausalLM.from_pretrained(config.student.model)
    assert teacher.config.vocab_size == student.config.vocab_size
    for domain in config.domains.values():
        for source in (*domain.train, *domain.validation):
            first = Path(source).read_text().splitlines()[0]
            assert json.loads(first)["text"]


def test_the_second_time_nothing_is_trained(cache: Path, monkeypatch):
    first = resolve_builtin(config_of(cache))

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train_model", refuse)
    assert resolve_builtin(config_of(cache)) == first


def test_both_models_share_a_tokenizer_that_gives_text_back(cache: Path):
    config = resolve_builtin(config_of(cache))
    paths = (config.teachers["main"].model, config.student.model)
    teacher, student = (AutoTokenizer.from_pretrained(path) for path in paths)
    assert teacher.get_vocab() == student.get_vocab()
    assert len(teacher) == models.VOCAB
    assert teacher.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>"]) == [0, 1, 2]
    text = "def f(x):\n\treturn 'é ∑'  # twice  \n"
    assert teacher.decode(teacher(text)["input_ids"]) == text


def test_a_config_without_builtin_names_is_left_alone(tmp_path: Path):
    domains = {"a": {"train": "a.jsonl"}}
    config = config_of(
        tmp_path, teachers={"main": {"model": "m"}}, student={"model": "s"}, domains=domains
    )
    assert resolve_builtin(config) is config
    assert list(tmp_path.iterdir()) == []


def test_own_text_beside_builtin_text_stays(cache: Path):
    domains = {"mixed": {"train": ["builtin:cpp", "/own.jsonl"], "validation": "/held.jsonl"}}
    config = resolve_builtin(config_of(cache, domains=domains))
    mixed = config.domains["mixed"]
    assert mixed.train[0].endswith("corpus/cpp.train.jsonl")
    assert mixed.train[1] == "/own.jsonl"
    assert mixed.validation == ["/held.jsonl"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"student": {"model": "builtin:studnet"}}, "builtin:student"),
        ({"domains": {"law": {"train": "builtin:legl"}}}, "builtin:legal"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path: Path, changes, named):
    with pytest.raises(ConfigError, match=f"did you mean '{named}'"):
        resolve_builtin(config_of(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_training_leaves_nothing(cache: Path, monkeypatch):
    folder = corpus.build_corpus(cache)
    build_tokenizer(folder)
    before = {path.name for path in folder.iterdir() if path.is_dir()}

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_model("teacher", folder, plan=ModelPlan(domains=("legal",), seed=7, **TINY))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == before


def test_another_plan_is_another_model(cache: Path):
    folder = corpus.build_corpus(cache)
    plan = ModelPlan(domains=("legal",), seed=5, **TINY)
    assert build_model("student", folder, plan=plan) != build_model("student", folder)


def test_training_lowers_the_loss_and_leaves_torch_as_it_was(monkeypatch):
    import numpy as np

    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tokens = np.tile(np.arange(3, 35), 40)
    plan = ModelPlan(domains=("x",), **TINY | {"steps": 60})
    model = training.train_model(plan, [tokens], vocab=64, title="test")
    ids = torch.from_numpy(tokens[:32].copy())[None]
    assert model(input_ids=ids, labels=ids).loss.item() < 1.0 < float(np.log(64))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(2), expected)


def test_muon_is_torchs_but_for_the_rounding_of_bfloat16():
    torch.manual_seed(0)
    starts = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(16, 16)]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(3)]
    moved = []
    for make in (training.Muon, partial(torch.optim.Muon, weight_decay=0.0)):
        matrices = [torch.nn.Parameter(start.clone()) for start in starts]
        optimiser = make(matrices, lr=0.1)
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            optimiser.step()
        moved.append([m.detach() - start for m, start in zip(matrices, starts, strict=True)])
    for ours, torchs in zip(*moved, strict=True):
        assert (ours - torchs).norm() < 0.02 * torchs.norm()


def test_the_real_student_knows_one_domain_and_is_smaller(monkeypatch):
    monkeypatch.undo()
    teacher, student = plans()["teacher"], plans()["student"]
    assert teacher.domains == DOMAINS
    assert len(student.domains) == 1
    assert (student.width, student.layers) < (teacher.width, teacher.layers)


def test_importing_is_cheap():
    heavy = "{'torch', 'transformers', 'ray', 'tokenizers', 'sympy'}"
    code = f"import sys, cluster.builtin.models; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
