"""A dense model made a mixture of experts: the same logits, a plain folder, experts that learn.

T tokens   V vocabulary
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.planning.bases import student_upcycled, with_student
from shared.config.models.student import Student
from shared.config.run import Config
from shared.errors import ConfigError
from shared.loading import keep_upcycling
from shared.run.run_dir import RunDir
from student_trainer.models.routers import router_balance_of
from student_trainer.models.upcycling import EXPERTS, ROUTER, SHARED
from student_trainer.state.model_card import model_card
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.student_trainer.state.test_model_card import USAGE
from tests.telling import telling

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
DENSE = {
    "llama": {},
    "llama tied and scaled": {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": ROPE},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
MIXTURES = [
    ("llama", 1, "mixtral"),
    ("llama", 2, "qwen2_moe"),
    ("llama tied and scaled", 1, "mixtral"),
    ("llama tied and scaled", 3, "qwen2_moe"),
    ("mistral", 2, "qwen2_moe"),
    ("mistral with a window", 1, "mixtral"),
    ("qwen2", 1, "qwen2_moe"),
    ("qwen2", 2, "qwen2_moe"),
    ("qwen3", 1, "qwen3_moe"),
    ("qwen3", 2, "qwen3_moe"),
]
IDS_1T = torch.arange(3, 63)[None]


def save_dense(folder: Path, name: str = "llama", **settings: object) -> Path:
    """A random model whose FFNs matter, biases too, with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **SIZES, **DENSE.get(name, {}), **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def config_of(folder: Path, model: Path, *, seed: int = 0, **student: object) -> Config:
    """The config of a run whose student is upcycled as `student` says."""
    asked = {"student": {"model": str(model), **student}, "seed": seed}
    asked |= {"paths": {"cache": str(folder / "cache")}}
    pair = tiny.Pair(model, model)
    return student_upcycled(plan_of(folder / "run", pair, prepared_domains(folder), **asked).config)


def logits_of(folder: str | Path) -> torch.Tensor:
    """As plain transformers computes them [T, V]."""
    asked: Any = {"output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(folder, **asked)  # type: ignore[misc]
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=IDS_1T, use_cache=False).logits[0]


@pytest.mark.parametrize(("name", "every", "kind"), MIXTURES)
@pytest.mark.parametrize(("experts", "top_k"), telling([(4, 2), (3, 1)], (3, 1)))
def test_a_mixture_computes_what_the_dense_model_does(
    tmp_path: Path, name: str, every: int, kind: str, experts: int, top_k: int
) -> None:
    """It is one of transformers' own, with experts from the first layer on, one in `every`."""
    dense = save_dense(tmp_path / "dense", name)
    upcycle = {"every": every, "experts": experts, "top_k": top_k}
    config = config_of(tmp_path, dense, upcycle=upcycle)
    expected_TV, found_TV = logits_of(dense), logits_of(config.student.model)
    assert (found_TV - expected_TV).abs().max() <= 1e-6 * expected_TV.abs().max()
    made = AutoModelForCausalLM.from_pretrained(config.student.model)
    assert made.config.model_type == kind
    weights = dict(made.named_parameters())
    layers = {int(found["layer"]) for place in weights if (found := EXPERTS.fullmatch(place))}
    assert layers == set(range(0, 3, every))
    first = weights["model.layers.0.mlp.experts.down_proj"]
    assert first.shape == (experts, 32, 48)
    assert torch.equal(first[0], first[-1])
    asked = {"weight": 0.01, "experts_per_token": top_k}
    assert router_balance_of(made.config) == asked


def test_routers_are_drawn_from_the_seed_and_a_folder_is_made_once(tmp_path: Path, capsys) -> None:
    dense = save_dense(tmp_path / "dense")
    first, again, other = (
        config_of(tmp_path, dense, upcycle={}, seed=seed).student.model for seed in (3, 3, 4)
    )
    assert first == again != other
    assert f"{dense}, upcycled to 4 experts in one layer in 2, 2 a token" in capsys.readouterr().out
    weights = [
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (first, other)
    ]
    routers = [torch.cat([w for n, w in each.items() if ROUTER.fullmatch(n)]) for each in weights]
    assert not torch.equal(*routers)
    assert 0.01 < routers[0].std() < 0.04  # transformers' own range


@pytest.mark.parametrize("train", ["experts", "all"])
def test_experts_and_routers_train_alone_or_with_all_others(tmp_path: Path, train: str) -> None:
    dense = save_dense(tmp_path / "dense")
    config = config_of(tmp_path, dense, upcycle={"train": train})
    model = CAUSAL_LM.load(config, device=CPU).saved
    for name, weight in model.named_parameters():
        sparse = EXPERTS.fullmatch(name) or ROUTER.fullmatch(name)
        assert weight.requires_grad == (train == "all" or sparse is not None), name


@pytest.mark.parametrize("train", ["experts", "all"])
def test_a_mixture_that_nobody_made_is_no_dense_student(tmp_path: Path, train: str) -> None:
    dense = save_dense(tmp_path / "dense")
    config = with_student(config_of(tmp_path, dense, upcycle={"train": train}), str(dense))
    with pytest.raises(ConfigError, match=r"for experts, and .*dense has none; .*loading\.made"):
        CAUSAL_LM.load(config, device=CPU)


def test_the_expert_for_all_tokens_stays_out(tmp_path: Path) -> None:
    """Its weights and their gradients are 0, so that no optimiser moves them."""
    dense = save_dense(tmp_path / "dense", "qwen2")
    config = config_of(tmp_path, dense, upcycle={"train": "all"})
    model = AutoModelForCausalLM.from_pretrained(config.student.model)
    model(input_ids=IDS_1T, labels=IDS_1T).loss.backward()
    shared = {n: w for n, w in model.named_parameters() if SHARED.fullmatch(n)}
    assert len(shared) == 2 * 4
    for name, weight in shared.items():
        assert not weight.any(), name
        assert weight.grad is not None
        assert not weight.grad.any(), name
    (gate,) = (w for n, w in model.named_parameters() if n == "model.layers.0.mlp.gate.weight")
    assert gate.grad is not None
    assert gate.grad.any()


def test_a_run_that_goes_on_finds_the_student_upcycled(tmp_path: Path) -> None:
    config = config_of(tmp_path, save_dense(tmp_path / "dense"), upcycle={})
    assert student_upcycled(config) == config
    other = {**config.student.upcycle.model_dump(), "experts": 8}  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"was upcycled otherwise, from .*; set student.model="):
        config_of(tmp_path, Path(config.student.model), upcycle=other)


def test_a_teacher_that_follows_the_student_is_the_same_mixture(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    config = config_of(tmp_path, dense)
    (name, teacher), *_ = config.teachers.items()
    following = teacher.model_validate(teacher.model_dump() | {"follow_student": {}})
    student = Student(model=str(dense), upcycle={})  # type: ignore[arg-type]
    asked = config.model_copy(update={"teachers": {name: following}, "student": student})
    found = student_upcycled(asked)
    assert found.teachers[name].model == found.student.model != str(dense)


def test_the_card_names_the_dense_model_and_what_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path, save_dense(tmp_path / "dense"), upcycle={})
    said = model_card(config, run_dir=RunDir(tmp_path / "run"), step=1, frozen=None, usage=USAGE)
    assert "dense, upcycled to 4 experts in one layer in 2, 2 a token, taught by" in said
    assert "\nbase_model: dense\n" in said
    assert "- trained: full, experts and routers alone" in said
    assert Path(config.student.model).name not in said


@pytest.mark.parametrize(
    ("name", "settings", "upcycle", "said"),
    [
        ("llama", {"attention_bias": True}, {}, "no place for 3 of its weights, as .*o_proj.bias"),
        ("llama", {"mlp_bias": True}, {}, r"no place for 9 of its weights, as .*mlp\.down"),
        ("mistral with a window", {}, {}, "a window of 8 tokens.*every=1 it becomes a mixtral"),
        ("qwen3_moe", {"moe_intermediate_size": 16, "num_experts": 4}, {}, "it is a qwen3_moe"),
    ],
)
def test_what_no_mixture_holds_is_refused(
    tmp_path: Path, name: str, settings: dict, upcycle: dict, said: str
) -> None:
    dense = save_dense(tmp_path / "dense", name, **settings)
    with pytest.raises(ConfigError, match=said) as refused:
        config_of(tmp_path, dense, upcycle=upcycle)
    assert str(refused.value).startswith(f"student.upcycle: {dense} cannot become a mixture")
    assert str(refused.value).endswith("leave student.upcycle out, or name another student")
    assert not list((tmp_path / "cache" / "upcycled").glob("dense-*[0-9a-f]"))


def test_adapters_that_reach_no_expert_are_refused(tmp_path: Path) -> None:
    train = {"kind": "lora", "r": 2}
    mixtral = config_of(tmp_path, save_dense(tmp_path / "dense"), upcycle={"every": 1}, train=train)
    CAUSAL_LM.load(mixtral, device=CPU)
    dense = save_dense(tmp_path / "other", "qwen2")
    config = config_of(tmp_path, dense, upcycle={}, train=train)
    for refusing in (lambda: CAUSAL_LM.load(config, device=CPU), lambda: CAUSAL_LM.trust(config)):
        with pytest.raises(ConfigError, match=r"on none of the experts .* copies of each other"):
            refusing()


def test_what_was_exported_is_a_mixture_that_trains_on(tmp_path: Path) -> None:
    """As in stages: the folder says what it was made as, and no place of this machine."""
    config = config_of(tmp_path, save_dense(tmp_path / "dense"), upcycle={})
    folder = tmp_path / "export"
    shutil.copytree(config.student.model, folder)
    (folder / "upcycled_from.json").unlink()
    keep_upcycling(folder, Path(config.student.model))
    assert str(tmp_path) not in (folder / "upcycled_from.json").read_text()
    again = config_of(tmp_path, folder, upcycle={})
    assert again.student.model == str(folder)
    model = CAUSAL_LM.load(again, device=CPU).saved
    assert {n for n, w in model.named_parameters() if not w.requires_grad}


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"upcycle": {"experts": 2, "top_k": 3}}, "top_k is 3, more than upcycle.experts, .* 2"),
        (
            {"upcycle": {"train": "all"}, "train": {"kind": "lora"}},
            "student.upcycle.train is all, but student.train.kind is lora",
        ),
    ],
)
def test_what_goes_not_together_is_refused(student: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Student.model_validate({"model": "m"} | student)


def test_what_it_was_made_from_lies_beside_the_weights(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    folder = Path(config_of(tmp_path, dense, upcycle={"every": 1}).student.model)
    told = json.loads((folder / "upcycled_from.json").read_text())
    assert told["model"] == str(dense)
    assert told["asked"] == {"every": 1, "experts": 4, "top_k": 2}
    assert (folder / "tokenizer.json").exists()
