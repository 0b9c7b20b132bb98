"""Loading a student: what is probed, what is frozen, what is refused in one sentence."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from shared.config.run import Config
from shared.data.trust import Trust
from shared.errors import ConfigError
from student_trainer.models.student import (
    take_apart,
    trust_in,
)
from student_trainer.tasks.causal_lm import CAUSAL_LM
from tests import tiny
from tests.student_trainer.runs import plan_of, prepared_domains

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "soft-cap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "scaled": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    "divided": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
    "multiplied": (HyperCLOVAXForCausalLM, HyperCLOVAXConfig(**SMALL, logits_scaling=8.0)),
    "cap of another name": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig(**SMALL, lru_width=32, logits_soft_cap=2.0),
    ),
    "a decoder that is not named": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, pad_token_id=0
        ),
    ),
    "learned positions": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ),
}


def config_of(folder: Path, model: Path, **options: object) -> Config:
    """A config that trains `model`."""
    pair = tiny.Pair(model, model)
    return plan_of(folder / "run", pair, prepared_domains(folder), **options).config


def saying(folder: Path, model: Path, fields: Mapping[str, object]) -> Path:
    """A copy of a model whose config says `fields` too."""
    copy = Path(shutil.copytree(model, folder / "model"))
    tiny.edit_config(copy, **fields)
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_and_head_are_found_in_other_families(family: str) -> None:
    torch.manual_seed(0)
    make, config = FAMILIES[family]
    model = make(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    parts = take_apart(model, name=family)
    ids = torch.arange(12)[None]
    rebuilt = parts.logits(parts.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(rebuilt, model(input_ids=ids, use_cache=False).logits)


def test_a_model_that_does_more_than_a_linear_head_is_refused() -> None:
    model = FAMILIES["scaled"][0](FAMILIES["scaled"][1])
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="does more than a linear head"):
        take_apart(model, name="odd")


class HeadOfItsOwn(torch.nn.Linear):
    """A linear layer by its type and its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 1.001


def test_a_head_that_does_not_do_what_its_weight_does_is_refused() -> None:
    """Training would go on with other logits than those of the export."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    take_apart(model, name="plain")
    head = HeadOfItsOwn(SMALL["hidden_size"], SMALL["vocab_size"], bias=False)
    head.load_state_dict(model.get_output_embeddings().state_dict())
    model.set_output_embeddings(head)
    with pytest.raises(ConfigError, match="does more than a linear head"):
        take_apart(model, name="odd")


@pytest.mark.parametrize(
    "said", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}]
)
def test_what_a_config_says_of_outputs_changes_nothing(
    tmp_path: Path, tiny_pair: tiny.Pair, said: dict[str, bool]
) -> None:
    folder = saying(tmp_path, tiny_pair.student, said)
    asked = {"attention": "sdpa"}  # which gives no attention weights
    config = config_of(tmp_path, folder, student=asked)
    assert CAUSAL_LM.trust(config).packed
    student = CAUSAL_LM.load(config, device=CPU)
    plain = CAUSAL_LM.load(config_of(tmp_path, tiny_pair.student, student=asked), device=CPU)
    ids = torch.arange(9)[None]
    states, expected = (
        s.decoder.eval()(input_ids=ids, use_cache=False).last_hidden_state for s in (student, plain)
    )
    assert torch.equal(states, expected)


@pytest.mark.parametrize("field", [{"num_attention_heads": 5}, {"hidden_size": "wide"}])
def test_a_config_that_is_not_valid_is_refused_with_its_reason(
    tmp_path: Path, tiny_pair: tiny.Pair, field: dict[str, object]
) -> None:
    folder = saying(tmp_path, tiny_pair.student, field)
    with pytest.raises(ConfigError, match=r"attention heads|hidden_size") as refused:
        CAUSAL_LM.trust(config_of(tmp_path, folder))
    assert "\n" not in str(refused.value)


def test_a_model_that_reads_position_ids_packs(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    assert CAUSAL_LM.trust(config_of(tmp_path, tiny_pair.student)) == Trust(packed=True)


def test_a_model_without_position_restarts_does_not_pack() -> None:
    torch.manual_seed(0)
    make, config = FAMILIES["learned positions"]
    model = make(config)
    attend = model.transformer.forward
    model.transformer.forward = lambda input_ids, position_ids=None, **k: attend(input_ids, **k)
    assert trust_in(model, name="odd", context=64) == Trust(packed=False)


def test_a_model_without_position_ids_does_not_pack() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4))
    assert trust_in(model, name="odd", context=64) == Trust(packed=False)
    take_apart(model, name="bloom")


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_leave_base_and_head_frozen(
    tmp_path: Path, tiny_pair: tiny.Pair, kind: str
) -> None:
    train = {"kind": kind, "r": 2}
    student = CAUSAL_LM.load(
        config_of(tmp_path, tiny_pair.student, student={"train": train}), device=CPU
    )
    trained = [name for name, p in student.saved.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not student.head.weight.requires_grad
    linears = sum("lora_A" in name for name in trained)
    assert linears == 2 * 7


def test_target_modules_name_what_is_adapted(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    train = {"kind": "lora", "target_modules": ["q_proj", "down_proj"]}
    student = CAUSAL_LM.load(
        config_of(tmp_path, tiny_pair.student, student={"train": train}), device=CPU
    )
    trained = [name for name, p in student.saved.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two matrices of two modules in two layers
    assert all("q_proj" in name or "down_proj" in name for name in trained)


@pytest.mark.parametrize("asked", [False, True])
def test_activations_are_made_anew_where_asked(
    tmp_path: Path, tiny_pair: tiny.Pair, asked: bool
) -> None:
    """A layer then runs twice in a step, the second time for its backward pass."""
    config = config_of(tmp_path, tiny_pair.student, student={"activation_checkpointing": asked})
    student, calls = CAUSAL_LM.load(config, device=CPU), []
    student.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    student.saved.train()
    found = student.decoder(input_ids=torch.arange(8)[None], use_cache=False)
    found.last_hidden_state.sum().backward()
    assert len(calls) == 1 + asked


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
def test_a_student_attends_as_the_config_says(
    tmp_path: Path, tiny_pair: tiny.Pair, attention: str
) -> None:
    config = config_of(tmp_path, tiny_pair.student, student={"attention": attention})
    found = CAUSAL_LM.load(config, device=CPU).decoder.config._attn_implementation
    assert found == {"auto": "sdpa"}.get(attention, attention)


WITHOUT_SDPA = {
    "gemma2": Gemma2Config(**SMALL, head_dim=8),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gpt-neo": GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", WITHOUT_SDPA)
def test_a_family_without_sdpa_is_a_student_too(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_config(WITHOUT_SDPA[family])
    model.save_pretrained(tmp_path / "model")
    assert CAUSAL_LM.load(config_of(tmp_path, tmp_path / "model"), device=CPU)
    asked = config_of(tmp_path, tmp_path / "model", student={"attention": "sdpa"})
    with pytest.raises(ConfigError, match=r"set student\.attention=auto") as refused:
        CAUSAL_LM.load(asked, device=CPU)
    assert "attn_implementation" not in str(refused.value)


def test_adapting_the_head_is_refused(tmp_path: Path) -> None:
    pair = tiny.save_pair(tmp_path / "models", tied=False)
    train = {"kind": "lora", "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ConfigError, match="adapts the output head"):
        CAUSAL_LM.load(config_of(tmp_path, pair.student, student={"train": train}), device=CPU)


def test_target_modules_that_match_nothing_are_refused(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    train = {"kind": "lora", "target_modules": ["no_such_layer"]}
    with pytest.raises(ConfigError, match="no_such_layer"):
        CAUSAL_LM.load(config_of(tmp_path, tiny_pair.student, student={"train": train}), device=CPU)


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    folder = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny_pair.student).config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"bare holds no \.safetensors weights"):
        CAUSAL_LM.load(config_of(tmp_path, folder), device=CPU)


def test_a_context_longer_than_the_model_reads_is_refused(
    tmp_path: Path, tiny_pair: tiny.Pair
) -> None:
    with pytest.raises(ConfigError, match=r"lower data\.context to 128"):
        CAUSAL_LM.load(config_of(tmp_path, tiny_pair.student, data={"context": 129}), device=CPU)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        CAUSAL_LM.load(config_of(tmp_path, tmp_path / "nowhere"), device=CPU)


def test_a_layer_that_the_student_lacks_is_refused(tmp_path: Path, tiny_pair: tiny.Pair) -> None:
    losses = [{"kind": "hidden_states", "layers": {1: 3}}]
    with pytest.raises(ConfigError, match=r"student layer 3, but .* has layers 0 to 2"):
        CAUSAL_LM.load(config_of(tmp_path, tiny_pair.student, losses=losses), device=CPU)


@pytest.mark.parametrize("damage", ["cut short", "other width", "layer missing"])
def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    tiny.save_model(model, width=32, layers=2)
    weights = model / "model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "other width":
        tiny.edit_config(model, intermediate_size=8)
    else:
        tiny.edit_config(model, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"cannot be loaded|lacks weights for") as refused:
        CAUSAL_LM.trust(config_of(tmp_path, model))
    assert "\n" not in str(refused.value)
