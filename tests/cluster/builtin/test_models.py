"""The embedded models are built once, safely, and stand behind their `builtin:` names."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.builtin import corpus, models, training
from cluster.builtin.corpus import DOMAINS
from cluster.builtin.models import build_model, resolve_builtin, stages_to_build
from cluster.builtin.muon import Muon
from cluster.builtin.plans import ModelPlan, plans
from cluster.builtin.team import paired
from cluster.report.stages import SENTENCES, begin, expect, stages_of_run
from cluster.session.interrupts import handling
from shared.config.run import Config
from shared.errors import ConfigError, StoppedError, TutelageError
from tests import signals

ROOT = Path(__file__).parents[3]
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


def same_weights(first: torch.nn.Module, second: torch.nn.Module, *, within: float) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all((a - b).abs().max() <= within for a, b in pairs)


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


def test_the_second_time_neither_torch_nor_transformers_is_imported(cache: Path):
    """They take as long to import as all else that a finished run says."""
    first = resolve_builtin(config_of(cache))
    script = f"""
import sys

sys.modules.update(dict.fromkeys(("torch", "transformers")))
from cluster.builtin import corpus, models
from cluster.builtin.plans import ModelPlan
from shared.config.run import Config

corpus.MAX_BYTES = {corpus.MAX_BYTES}
plans = {TINY_PLANS}
models.plans = lambda: plans
print(models.resolve_builtin(Config.model_validate_json(sys.argv[1])).model_dump_json())
"""
    command = [sys.executable, "-c", script, config_of(cache).model_dump_json()]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert Config.model_validate_json(again.stdout) == first


def test_both_models_share_a_tokenizer_that_gives_text_back(cache: Path):
    config = resolve_builtin(config_of(cache))
    paths = (config.teachers["main"].model, config.student.model)
    teacher, student = (AutoTokenizer.from_pretrained(path) for path in paths)
    assert teacher.get_vocab() == student.get_vocab()
    assert len(teacher) == models.VOCAB
    assert teacher.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>"]) == [0, 1, 2]
    text = "def f(x):\n\treturn 'é ∑'  # twice  \n"
    assert teacher.decode(teacher(text)["input_ids"]) == text


def test_stages_are_those_that_the_cache_lacks(tmp_path: Path, capsys):
    config = config_of(tmp_path, baseline=True)
    found = stages_to_build(config)
    expect([*found, *stages_of_run(config)])
    resolve_builtin(config)
    begin("baseline")
    told = [line for line in capsys.readouterr().out.splitlines() if " of 5: " in line]
    assert [line[:8] for line in told] == ["1 of 5: ", "2 of 5: ", "5 of 5: "]
    assert found == ["corpus", "models"]
    assert stages_to_build(config) == []
    expect(["start"])
    resolve_builtin(config)
    begin("baseline")
    assert capsys.readouterr().out == f"{SENTENCES['baseline']}\n"


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


def interrupted_at(number: int) -> Callable[..., float]:
    """A training step that is interrupted when it is called for the `number`th time, from 0."""
    calls, step = count(), training._train_step

    def counted(*given, **options) -> float:
        if next(calls) == number:
            raise KeyboardInterrupt
        return step(*given, **options)

    return counted


def test_an_interrupted_training_continues_where_it_was(cache: Path, monkeypatch):
    folder = corpus.build_corpus(cache)
    plan = ModelPlan(domains=("legal",), seed=7, **TINY | {"steps": 6})
    whole = build_model("student", folder, plan=plan)
    before = {path.name for path in folder.iterdir() if path.is_dir()}
    monkeypatch.setattr(training, "KEEP_EVERY_S", 0.0)
    step = training._train_step
    monkeypatch.setattr(training, "_train_step", interrupted_at(4))
    with pytest.raises(KeyboardInterrupt):
        build_model("teacher", folder, plan=plan)
    monkeypatch.setattr(training, "_train_step", step)
    monkeypatch.setattr(training, "_train_step", interrupted_at(2))  # two steps are left
    built = build_model("teacher", folder, plan=plan)
    models = (AutoModelForCausalLM.from_pretrained(path) for path in (built, whole))
    assert same_weights(*models, within=0.0)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == before | {built.name}


def test_a_signal_keeps_the_step_under_way_also_before_anything_was_kept(
    cache: Path, monkeypatch, capfd
):
    folder = corpus.build_corpus(cache)
    plan = ModelPlan(domains=("legal",), seed=8, **TINY | {"steps": 6})
    whole = build_model("student", folder, plan=plan)
    step, calls = training._train_step, count(1)

    def signalled(*given, **options) -> float:
        if next(calls) == 3:
            signals.send(signal.SIGTERM)
            time.sleep(0.1)  # another thread hears it
        return step(*given, **options)

    monkeypatch.setattr(training, "_train_step", signalled)
    stopped = pytest.raises(StoppedError, match="Stopped after step 3 of 6 of the built-in teacher")
    with handling(), stopped:
        build_model("teacher", folder, plan=plan)
    assert "SIGTERM: the step under way is finished and kept" in capfd.readouterr().err
    monkeypatch.setattr(training, "_train_step", interrupted_at(4))  # three steps are left
    built = build_model("teacher", folder, plan=plan)
    models = (AutoModelForCausalLM.from_pretrained(path) for path in (built, whole))
    assert same_weights(*models, within=0.0)


def test_another_plan_is_another_model(cache: Path):
    folder = corpus.build_corpus(cache)
    plan = ModelPlan(domains=("legal",), seed=5, **TINY)
    assert build_model("student", folder, plan=plan) != build_model("student", folder)


@pytest.mark.drill
def test_two_processes_train_what_one_does(tmp_path: Path):
    """But for the rounding, of bfloat16 where the processor has it."""
    tokens = [np.random.default_rng(0).integers(3, 64, 2_000)]

    def trained(steps: int, processes: int) -> torch.Tensor:
        plan = ModelPlan(domains=("x",), **TINY | {"steps": steps, "rows_per_step": 4})
        model = training.train_model(
            plan, tokens, vocab=64, title="test", folder=tmp_path / "training", processes=processes
        )
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    start, alone, paired = trained(0, 1), trained(5, 1), trained(5, 2)
    assert (alone - paired).norm() < 0.05 * (alone - start).norm()
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_second_process_is_told(tmp_path: Path):
    with (
        paired("compileall", ["-q", str(tmp_path)], tmp_path, numbers=4) as pair,
        pytest.raises(TutelageError, match="continues from what was kept last"),
    ):
        pair.add_up(torch.zeros(4))
    assert list(tmp_path.iterdir()) == []


def test_training_lowers_the_loss_and_leaves_torch_as_it_was(tmp_path: Path):
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tokens = np.tile(np.arange(3, 35), 40)
    plan = ModelPlan(domains=("x",), **TINY | {"steps": 40})
    model = training.train_model(plan, [tokens], vocab=64, title="test", folder=tmp_path / "t")
    ids = torch.from_numpy(tokens[:32].copy())[None]
    assert model(input_ids=ids, labels=ids).loss.item() < 1.0 < float(np.log(64))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(2), expected)


def test_muon_is_torchs_but_for_the_rounding_of_bfloat16():
    torch.manual_seed(0)
    starts = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(16, 16)]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(3)]
    moved = []
    for make in (Muon, partial(torch.optim.Muon, weight_decay=0.0)):
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
