"""Weights are those of real models to the byte; activations are those that live in real passes."""

from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from cluster.sizing.memory import ModelSizes
from cluster.sizing.tracing import module_sizes, student_sizes, teacher_sizes, writing_of
from shared.config.models.modules import TrainedModules
from shared.config.models.student import Student, Upcycle
from shared.config.models.teachers import Teacher
from shared.errors import ConfigError
from shared.model_parts import decoder_of
from shared.targets.weights import ModuleFiles
from student_trainer.models.student import load_student
from student_trainer.models.upcycling import upcycled
from student_trainer.tasks.causal_lm import CAUSAL_LM
from teacher_service.engine.loading import load_model
from teacher_service.engine.lora import LoraModules
from tests.allocations import peak_bytes
from tests.cluster.sizing.held import config_of
from tests.cluster.sizing.small import SMALL
from tests.telling import telling

FAMILIES = {
    "llama, tied": transformers.LlamaConfig(**SMALL),
    "llama, untied": transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": False}),
    "gpt2": transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=2, n_head=4),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma2": transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=32),
    "mixture": transformers.Qwen3MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
}

CASES = tuple(product(FAMILIES, ("float32", "bfloat16")))


def saved(folder: Path, config) -> str:
    """A model's config.json alone."""
    config.save_pretrained(folder)
    return str(folder)


def whole(folder: Path) -> str:
    """A real model with weights."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return str(folder)


def state_bytes(model: nn.Module) -> int:
    """Of a state dict, tied tensors once."""
    storages = [t.untyped_storage() for t in model.state_dict().values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def sizes_of(model: str, **options: Any) -> ModelSizes:
    return student_sizes(Student(model=model, **options), lines=1, tokens=32, seed=0)[0]


@pytest.mark.parametrize(
    ("family", "dtype"),
    telling(CASES, ("llama, untied", "float32"), ("gpt2", "float32"), ("mixture", "bfloat16")),
)
def test_weights_are_those_of_the_real_state_dict_to_the_byte(family, dtype, tmp_path):
    config = FAMILIES[family]
    found = sizes_of(saved(tmp_path, config), dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    assert found.weight_bytes == state_bytes(model)
    assert found.num_weights == sum(p.numel() for p in model.parameters())
    assert found.tied == config.tie_word_embeddings


@pytest.mark.parametrize(
    ("family", "dtype"), telling(CASES, ("qwen2", "float32"), ("gemma2", "bfloat16"))
)
def test_keys_and_values_are_those_of_real_writing_to_the_byte(family, dtype, tmp_path):
    config = FAMILIES[family]
    student = Student(model=saved(tmp_path, config), dtype=dtype)
    planned = writing_of("student", student, lines=3, opening=8, tokens=24)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    opening_BT = torch.full((3, 8), 7)
    written = model.generate(
        opening_BT, max_new_tokens=17, min_new_tokens=17, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    held = [t for layer in written.past_key_values.layers for t in vars(layer).values()]
    real = {id(t): t.nbytes for t in held if isinstance(t, torch.Tensor) and t.dim()}
    assert planned.states_bytes == sum(real.values())  # of all but the last token


@pytest.mark.parametrize(
    "targets", telling(["all-linear", ["q_proj", "down_proj"]], ["q_proj", "down_proj"])
)
def test_modules_of_a_teacher_are_those_that_it_learns_with(targets, tmp_path):
    folder, asked = whole(tmp_path), TrainedModules(r=3, target_modules=targets)
    teacher = Teacher(model=folder, online_modules=asked)
    count, learning = module_sizes("t", teacher, asked, lines=2, tokens=32)
    decoder = decoder_of(transformers.AutoModelForCausalLM.from_pretrained(folder))
    assert decoder is not None
    real = LoraModules(decoder, asked, seed=0, files=ModuleFiles(tmp_path / "versions"))
    assert count == sum(p.numel() for p in real.parameters.values())
    _, scoring = teacher_sizes("t", teacher, lines=2, tokens=32)
    assert learning.traced
    assert learning.most_bytes > scoring.most_bytes
    assert learning.flops > 1.5 * scoring.flops  # backward, from the last layer to the first module


@pytest.mark.parametrize("kind", telling(["lora", "qlora"], "qlora"))
def test_adapters_and_4_bits_are_those_of_the_real_student(kind, tmp_path):
    student = {"model": whole(tmp_path), "train": {"kind": kind, "r": 5}}
    found = sizes_of(student["model"], train={"kind": kind, "r": 5})
    config = config_of(0, "float32", workers=1)
    config = config.model_copy(update={"student": Student.model_validate(student)})
    real = load_student(config, CAUSAL_LM.model, device=torch.device("cpu")).saved
    assert found.weight_bytes == held_bytes(real)
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("train", telling(["experts", "all"], "experts"))
def test_an_upcycled_student_counts_all_experts_and_what_of_it_trains(train, tmp_path):
    asked = Upcycle(every=1, experts=5, train=train)
    dense = transformers.AutoModelForCausalLM.from_pretrained(whole(tmp_path / "dense"))
    upcycled(dense, asked, name="dense", seed=0).save_pretrained(tmp_path / "mixture")
    student = {"model": str(tmp_path / "mixture"), "upcycle": asked.model_dump()}
    found = sizes_of(student["model"], upcycle=asked)
    config = config_of(0, "float32", workers=1)
    config = config.model_copy(update={"student": Student.model_validate(student)})
    real = load_student(config, CAUSAL_LM.model, device=torch.device("cpu")).saved
    assert found.num_weights == sum(p.numel() for p in real.parameters())
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    ffns = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    routers = 2 * 5 * dense.config.hidden_size
    assert found.num_weights == dense.num_parameters() + 4 * ffns + routers
    assert (found.trained == 5 * ffns + routers) == (train == "experts")


@pytest.mark.parametrize("quantisation", telling(["int8", "nf4"], "int8"))
def test_a_quantised_teacher_weighs_what_the_real_one_does(quantisation, tmp_path):
    folder = whole(tmp_path)
    asked = Teacher(model=folder, quantisation=quantisation)
    found, _ = teacher_sizes("t", asked, lines=1, tokens=32)
    assert found.weight_bytes == held_bytes(real_teacher(asked))


@pytest.mark.parametrize("dtype", telling(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("quantisation", telling(["none", "nf4"], "nf4"))
def test_a_teacher_with_an_adapter_weighs_what_the_real_one_does(quantisation, dtype, tmp_path):
    folder, adapter = whole(tmp_path / "base"), tmp_path / "adapter"
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, peft.LoraConfig(r=5, target_modules="all-linear")).save_pretrained(
        adapter
    )
    asked = Teacher(model=folder, adapter=str(adapter), quantisation=quantisation, dtype=dtype)
    found, scoring = teacher_sizes("t", asked, lines=1, tokens=32)
    assert scoring.traced
    assert found.weight_bytes == held_bytes(real_teacher(asked))
    alone, _ = teacher_sizes("t", asked.model_copy(update={"adapter": None}), lines=1, tokens=32)
    assert found.weight_bytes > alone.weight_bytes


def test_an_adapter_that_cannot_be_read_is_one_sentence(tmp_path):
    folder = whole(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "NONE_SUCH"}')
    asked = Teacher(model=folder, adapter=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"teachers.t.adapter is .* peft cannot build an adapter"):
        teacher_sizes("t", asked, lines=1, tokens=32)


def real_teacher(asked: Teacher) -> nn.Module:
    return load_model(
        asked.model,
        revision=None,
        adapter=asked.adapter,
        adapter_revision=None,
        dtype=asked.dtype,
        attention="auto",
        quantisation=asked.quantisation,
        device="cpu",
        trust_remote_code=False,
    ).model


def held_bytes(model: nn.Module) -> int:
    """Of weights, with what bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes + state.code.nbytes
        if (scales := getattr(parameter, "SCB", None)) is not None:
            total += scales.nbytes
    return total


# The products of experts can be followed in bfloat16 alone.
FOLLOWED = {name: "bfloat16" if name == "mixture" else "float32" for name in FAMILIES}


def real_peak(config, *, lines: int, tokens: int, dtype: str, checkpointing: bool) -> int:
    """Bytes that live at most in a real forward and backward pass, gradients of weights apart."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    decoder = decoder_of(model)
    assert decoder is not None

    def passes() -> None:
        ids = torch.zeros(lines, tokens, dtype=torch.int64)
        places = (torch.arange(tokens) % 40).repeat(lines, 1)  # documents of 40 tokens
        decoder(
            input_ids=ids, position_ids=places, use_cache=False
        ).last_hidden_state.sum().backward()

    return peak_bytes(passes)


@pytest.mark.parametrize("family", telling(FAMILIES, "gemma2", "mixture"))
def test_activations_are_those_that_live_in_real_passes(family, tmp_path):
    config, size = FAMILIES[family], {"lines": 2, "tokens": 96}
    asked = Student(model=saved(tmp_path, config), dtype=FOLLOWED[family])
    _, found = student_sizes(asked, **size, seed=0)
    real = real_peak(config, **size, dtype=asked.dtype, checkpointing=False)
    assert found.traced
    assert found.most_bytes == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", telling(FAMILIES, "qwen2"))
def test_recomputed_activations_are_those_of_a_layer_or_two(family, tmp_path):
    """Without numbers a layer's are let go of once the next one's are there, not as they are used:
    the estimate is above the truth, by a layer's at most."""
    config, size = FAMILIES[family], {"lines": 2, "tokens": 96}
    plain = Student(model=saved(tmp_path, config), dtype=FOLLOWED[family])
    asked = plain.model_copy(update={"activation_checkpointing": True})
    _, kept = student_sizes(plain, **size, seed=0)
    _, found = student_sizes(asked, **size, seed=0)
    real = real_peak(config, **size, dtype=asked.dtype, checkpointing=True)
    assert 0.95 * real <= found.most_bytes <= real + kept.kept_bytes / config.num_hidden_layers


def test_activations_grow_with_rows_and_tokens_and_shrink_with_checkpointing(tmp_path):
    folder = saved(tmp_path, FAMILIES["qwen2"])

    def most(lines: int, tokens: int, **options) -> int:
        asked = Student(model=folder, **options)
        return student_sizes(asked, lines=lines, tokens=tokens, seed=0)[1].most_bytes

    assert most(2, 64) < most(4, 64) < most(4, 128)
    assert most(4, 128, activation_checkpointing=True) < most(4, 128)


def test_a_mixture_of_experts_computes_the_experts_that_a_token_is_sent_to(tmp_path):
    few, all_ = (FAMILIES["mixture"].to_dict() | {"num_experts_per_tok": n} for n in (2, 8))
    flops = []
    for number, fields in enumerate((few, all_)):
        folder = saved(tmp_path / str(number), transformers.Qwen3MoeConfig(**fields))
        asked = Teacher(model=folder)
        flops.append(teacher_sizes("t", asked, lines=1, tokens=64)[1].flops)
    experts = 2 * 2 * 3 * 128 * 64 * 64  # layers, operations, matrices, width, inner width, tokens
    assert flops[1] - flops[0] == experts * 6


def test_a_config_of_no_known_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(ConfigError, match=r"student.model is .* cannot build"):
        sizes_of(str(tmp_path))
