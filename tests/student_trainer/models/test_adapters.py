"""What trains is what a text's gradient reaches: no router, no mixer's plain weight, no tower."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from shared.errors import ConfigError
from student_trainer.models.census import census
from student_trainer.models.student import Student
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.group import run_jobs
from tests.student_trainer.processes import as_job
from tests.student_trainer.runs import plan_of, prepared_domains
from tests.telling import telling

TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MIXER = {"head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 511, "boi_token_index": 510}
MODELS = {
    "mamba2": lambda: AutoConfig.for_model("mamba2", **(TEXT | MIXER | {"num_heads": 8})),
    "falcon_h1": lambda: AutoConfig.for_model("falcon_h1", **(TEXT | FALCON)),
    "jamba": lambda: AutoConfig.for_model("jamba", **(TEXT | EXPERTS | JAMBA)),
    "phimoe": lambda: AutoConfig.for_model("phimoe", **(TEXT | EXPERTS)),
    "mixtral": lambda: AutoConfig.for_model("mixtral", **(TEXT | EXPERTS)),
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "sliding_window": 16},
        vision_config=VISION,
        eoi_token_index=509,
        **IMAGES,
    ),
}
FALCON = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8}
LORA, QLORA = {"kind": "lora", "r": 2}, {"kind": "qlora", "r": 2}


def save(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    tiny.save_tokenizer(folder)
    AutoModelForCausalLM.from_config(MODELS[family]()).save_pretrained(folder)
    return folder


def load(folder: Path, family: str, train: dict) -> Student:
    model = save(folder / "model", family)
    pair = tiny.Pair(model, model)
    plan = plan_of(folder / "run", pair, prepared_domains(folder), student={"train": train})
    return CAUSAL_LM.load(plan.config, device=torch.device("cpu"))


@pytest.mark.parametrize("family", MODELS)
def test_every_adapter_gets_a_gradient(tmp_path: Path, family: str) -> None:
    student = load(tmp_path, family, LORA)
    student.saved.train()
    found = student.decoder(input_ids=torch.arange(20)[None], use_cache=False).last_hidden_state
    student.head(found).logsumexp(-1).sum().backward()
    trained = {name: p for name, p in student.saved.named_parameters() if p.requires_grad}
    assert any("proj" in name for name in trained)
    assert all("lora_" in name and p.grad is not None for name, p in trained.items())


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("mamba2", "out_proj"), ("jamba", "dt_proj"), ("phimoe", "router"), ("gemma3", "vision")],
)
def test_what_no_adapter_reaches_is_left_out(tmp_path: Path, family: str, left_out: str) -> None:
    student = load(tmp_path, family, LORA)
    names = [name for name, _ in student.saved.named_parameters()]
    assert any(left_out in name for name in names)
    assert not any(left_out in name and "lora_" in name for name in names)


def test_named_layers_are_adapted_in_the_decoder_alone(tmp_path: Path) -> None:
    student = load(tmp_path, "gemma3", LORA | {"target_modules": ["q_proj"]})
    adapted = [name for name, _ in student.saved.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2
    assert all("language_model" in name for name in adapted)


def test_layers_of_a_tower_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        load(tmp_path, "gemma3", LORA | {"target_modules": ["fc1"]})


@pytest.mark.parametrize("names", [["q_proj", "nope"], ["nope", "up_proj", "q_pro"]])
def test_a_name_of_no_layer_is_refused_beside_others(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"target_modules names nope, but .* (q|up)_proj: corr"):
        load(
            tmp_path,
            "mixtral" if "up_proj" not in names else "gemma3",
            LORA | {"target_modules": names},
        )


def test_experts_have_the_names_of_their_files(tmp_path: Path) -> None:
    student = load(tmp_path, "mixtral", LORA | {"target_modules": ["q_proj", "w1", "w2", "w3"]})
    said = census(student).sentence(adapts=True, quantises=False)
    assert "on 2 linear layers; 4 of 4 fused expert tensors are adapted" in said


def test_a_name_may_lead_to_one_layer_or_be_said_twice(tmp_path: Path) -> None:
    names = ["q_proj", "q_proj", "layers.1.self_attn.v_proj"]
    student = load(tmp_path, "mixtral", LORA | {"target_modules": names})
    adapted = [name for name, _ in student.saved.named_parameters() if "lora_A" in name]
    assert len(adapted) == 3


@pytest.mark.parametrize(
    ("family", "train", "said"),
    [
        ("mixtral", LORA, "on 10 linear layers; 4 of 4 fused expert tensors are adapted"),
        ("phimoe", LORA, "on 8 linear layers; 0 of 4 fused expert tensors are adapted"),
        ("phimoe", QLORA, "6,144 in nf4"),
        ("phimoe", QLORA, "4 fused expert tensors stay unquantised, since nf4 takes linear"),
        ("gemma3", {"kind": "full"}, "beside decoder and head, exported as they came"),
    ],
)
def test_what_trains_is_said(tmp_path: Path, family: str, train: dict, said: str) -> None:
    student = load(tmp_path, family, train)
    counted = census(student)
    sentence = counted.sentence(adapts=student.is_adapted, quantises=train == QLORA)
    assert said in sentence
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters()
    adapters = counted.trained if student.is_adapted else 0
    assert counted.trained + counted.frozen == whole + adapters


@pytest.mark.parametrize("zero", telling(range(4), 3))
def test_a_tower_is_exported_as_it_came_whatever_the_stage(tmp_path: Path, zero: int) -> None:
    """With weight decay, and once more after a resume."""
    model, domains = save(tmp_path / "model", "gemma3"), prepared_domains(tmp_path)
    plan = plan_of(
        tmp_path / "run",
        tiny.Pair(model, model),
        domains,
        steps=4,
        student={"zero": zero, "workers": 1},
        losses=[{"kind": "cross_entropy"}],
        optimiser={"weight_decay": 0.5},
    )
    run_jobs([as_job("resumed", plan, at=2)], tmp_path / "jobs", ranks=1)
    before = load_file(model / "model.safetensors")
    beside = [name for name in before if "vision" in name or "projector" in name]
    assert beside
    for run in ("run", "run-resumed"):
        after = load_file(tmp_path / run / "export" / "model.safetensors")
        assert set(after) == set(before)
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert not changed & set(beside)
        assert len(changed) == len(before) - len(beside)
        said = (tmp_path / run / "logs" / "progress.log").read_text().splitlines()[0]
        number = sum(int(np.prod(before[n].shape)) for n in beside)
        assert f"{number:,} are frozen ({number:,} beside decoder and head" in said
