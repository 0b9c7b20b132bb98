"""Models and adapters whose files are damaged, missing or of something else: named before the
start, in one sentence, teacher and student alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.planning.preparation import prepare_run
from shared.config.file import load_config
from shared.errors import ConfigError
from tests import tiny
from tests.cluster.jobs import write_job
from tests.telling import in_turn, telling


def other_sizes(folder: Path) -> None:
    tiny.edit_config(folder, intermediate_size=8)


def more_layers(folder: Path) -> None:
    tiny.edit_config(folder, num_hidden_layers=5, layer_types=None)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lost_shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def no_index(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()


def odd_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('["model.safetensors"]')


def other_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pointer(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(LFS)

    return make


def replaced(name: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text(content)

    return make


def config_of(**fields: object) -> Callable[[Path], None]:
    return lambda folder: tiny.edit_config(folder, **fields)


def link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nothing")


def folder_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def integers(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = {name: weight.to(torch.int8) for name, weight in load_file(path).items()}
    save_file(whole, path, metadata={"format": "pt"})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
ONE = {"short_factor": [1.0], "long_factor": [2.0]}
UNLIKE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 3}
FAULTS = {
    other_sizes: r"weights do not have the sizes of its config\.json; get both from one model",
    more_layers: r"lacks weights for model\.layers\.",
    cut_off: r"one of its \.safetensors files is damaged or cut off \(.*\); get it again",
    lost_shard: r"lacks model-0000\d-of-0000\d\.safetensors of its \d files of weights; get the w",
    no_index: r"holds \d of \d files of weights and no model\.safetensors\.index\.json",
    odd_index: r"whose model\.safetensors\.index\.json cannot be read",
    other_format: r"without weights \(.*\), with pytorch_model\.bin in a format that is not read",
    pointer("model.safetensors"): r"model\.safetensors is a pointer of Git LFS .* `git lfs pull`",
    pointer("config.json"): r"where config\.json is a pointer of Git LFS",
    pointer("tokenizer.json"): r"where tokenizer\.json is a pointer of Git LFS",
    replaced("tokenizer.json", '{"version": "1.'): r"whose tokenizer\.json is not valid JSON \(",
    replaced("config.json", "{"): r"whose config\.json is not valid JSON \(.*\); get it again",
    replaced("tokenizer.json", "{}"): r"whose tokenizer transformers cannot read: ",
    config_of(pad_token_id=9999): r"pad_token_id in its config\.json is no row of its embedding",
    config_of(rope_parameters=LONGROPE | ONE): r"positions, 1 in short_factor and 1 in long_factor",
    config_of(rope_parameters=LONGROPE | UNLIKE): r"4 in short_factor and 3 in long_factor, that",
    link_to_nothing: r", a folder without weights \(\*\.safetensors\); name a folder written by",
    folder_of_weights: r", a folder without weights \(\*\.safetensors\); name a folder written by",
    integers: r"embed_tokens\.weight in model\.safetensors is stored in integers \(I8\) and config",
    replaced("config.json", "null"): r"whose config\.json holds no JSON object but null; get it",
    replaced("generation_config.json", "[1]"): r"generation_config\.json holds no JSON object but",
    replaced(
        "tokenizer_config.json", "[]"
    ): r"tokenizer_config\.json holds no JSON object but \[\]",
    config_of(model_type="t5"): r"its architecture, T5, is none of transformers' causal language m",
    config_of(quantization_config=[1]): r"whose config\.json transformers cannot read: ",
    config_of(attn_implementation="spiral"): r"set (teachers\.t|student)\.attention=eager, since",
}


@pytest.mark.parametrize(("fault", "role"), in_turn(FAULTS, ["teacher", "student"]))
def test_weights_that_are_not_those_of_the_config_are_named_before_the_start(
    tmp_path: Path, tiny_pair: tiny.Pair, role: str, fault: Callable[[Path], None]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(getattr(tiny_pair, role), folder)
    fault(folder)
    named = {"teacher": {"teachers": {"t": {"model": str(folder)}}}}
    named |= {"student": {"student": {"model": str(folder)}}}
    job = load_config(write_job(tmp_path, tiny_pair, **named[role]))
    with pytest.raises(ConfigError, match=FAULTS[fault]) as refused:
        prepare_run(job)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


FEW_BITS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"in 4 bits by gptq: .*optimum.*; install what"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"in 4 bits by awq: .*gptqmodel.*; install what"),
    "no method": ({"bits": 4}, r"in 4 bits by an unnamed method: .*quant_method"),
    "unknown": (
        {"quant_method": "zip9"},
        r"by zip9, which .* does not read; take quantization_con",
    ),
}


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.parametrize("gpus", telling([0, 1], 0))
def test_few_bits_that_nothing_here_reads_are_named_before_the_start(
    tmp_path: Path, tiny_pair: tiny.Pair, name: str, gpus: int
) -> None:
    settings, said = FEW_BITS[name]
    folder = tmp_path / "few"
    shutil.copytree(tiny_pair.teacher, folder)
    tiny.edit_config(folder, quantization_config=settings)
    asked = {"model": str(folder), "gpus": gpus if name in ("gptq", "awq", "unknown") else 0}
    job = load_config(write_job(tmp_path, tiny_pair, teachers={"t": asked}))
    with pytest.raises(ConfigError, match=rf"teachers\.t\.model is {folder}, .* stored .*{said}"):
        prepare_run(job)


@pytest.fixture
def adapter(tmp_path: Path, tiny_pair: tiny.Pair) -> Path:
    """An adapter on the tiny teacher."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def weights_of(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return make


def settings_of(**fields: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return make


def half(weights: dict) -> dict:
    return {name: value for name, value in weights.items() if "up_proj" not in name}


ADAPTERS = {
    "half of it": (weights_of(half), r"lacks weights for model\.layers\.0\.mlp\.up_proj\.lora_A"),
    "beyond": (settings_of(target_modules=["q_proj"]), r"has weights beyond its config, as .*up_p"),
    "another rank": (settings_of(r=4), r"its weights do not fit this model; name the base"),
    "no such layer": (
        settings_of(target_modules=["zzz"]),
        r"'zzz'. not found in the base model; n",
    ),
    "kind": (settings_of(peft_type="ZZZ"), r"adapter_config\.json names 'ZZZ', which the inst"),
    "cut off": (
        replaced("adapter_config.json", '{"peft_type": "LO'),
        r"is not valid JSON \(Unterm",
    ),
    "damaged": (
        replaced("adapter_model.safetensors", "<html>"),
        r"damaged or cut off .*; get it a",
    ),
    "pointer": (pointer("adapter_model.safetensors"), r"is a pointer of Git LFS"),
    "none": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"teachers\.t\.adapter is .*, a folder without adapter_model\.safetensors; name .* of peft",
    ),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_a_teachers_adapter_that_does_not_go_on_it_is_named_before_the_start(
    tmp_path: Path, tiny_pair: tiny.Pair, adapter: Path, fault: str
) -> None:
    make, said = ADAPTERS[fault]
    teacher = {"model": str(tiny_pair.teacher), "adapter": str(adapter)}
    job = load_config(write_job(tmp_path, tiny_pair, teachers={"t": teacher}))
    prepare_run(job)
    make(adapter)
    with pytest.raises(ConfigError, match=said) as refused:
        prepare_run(job)
    assert str(adapter) in str(refused.value)
    assert "\n" not in str(refused.value)
