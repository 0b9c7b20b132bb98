"""Tiny random models of every causal family that the installed transformers has.

A family's config is its own default, with the sizes of every part made small by name: most families
call the same thing by one of a few names. What a family needs beside that stands in `own.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import tiny
from tests.families.own import OWN

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WIDTH, LAYERS, HEADS, POSITIONS, WINDOW = 32, 2, 4, 128, 8
LARGEST = 3_000_000  # weights; more means that a size was missed

SIZES: dict[int | float, str] = {
    tiny.VOCAB: "vocab_size n_vocab text_vocab_size vocab_size_per_layer_input",
    WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim n_embed "
    "embedding_dim moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size lru_width "
    "shared_expert_intermediate_size attention_hidden_size dim_model_base",
    2 * WIDTH: "intermediate_size ffn_dim n_inner d_ff dff ffn_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim feed_forward_size dense_intermediate_size shared_intermediate_size "
    "mlp_intermediate_size intermediate_size_mlp block_ff_dim inner_dim d_inner dim_ff",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok "
    "num_global_key_value_heads swa_num_key_value_heads num_experts_per_token moe_k top_k_experts "
    "moe_topk index_n_heads linear_num_key_heads",
    HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts "
    "decoder_attention_heads num_local_experts n_routed_experts moe_num_experts "
    "linear_num_value_heads mamba_n_heads mamba_num_heads",
    WIDTH // HEADS: "head_dim attention_head_dim attn_head_dim global_head_dim swa_head_dim "
    "v_head_dim qk_nope_head_dim qk_rope_head_dim swa_v_head_dim kv_channels rotary_dim "
    "q_lora_rank kv_lora_rank laurel_rank adapter_rank mamba_d_state state_size "
    "ssm_state_size index_topk "
    "hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim mamba_chunk_size "
    "chunk_size mamba2_chunk_size sliding_window window_size attention_window_size",
    2 * WIDTH // HEADS: "mamba_d_head mamba_head_dim index_head_dim",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts num_shared_experts bos_token_id "
    "first_k_dense_replace decoder_start_token_id mamba_n_groups n_groups mamba_ngroups",
    POSITIONS: "max_position_embeddings n_positions max_seq_len n_ctx seq_length context_length "
    "max_seq_length",
    0: "pad_token_id dropout attention_dropout activation_dropout hidden_dropout attn_pdrop "
    "embd_pdrop resid_pdrop hidden_dropout_prob attention_probs_dropout_prob layerdrop "
    "router_jitter_noise input_jitter_noise attn_dropout embedding_dropout",
    0.2: "initializer_range init_std",
    tiny.VOCAB - 1: "image_token_id image_token_index video_token_id audio_token_id boi_token_id "
    "vision_start_token_id vision_end_token_id boi_token_index eoi_token_index boa_token_id "
    "eoa_token_id eoi_token_id",
}  # fmt: skip
BY_NAME = {name: value for value, names in SIZES.items() for name in names.split()} | {
    "eos_token_id": 2,
    "is_decoder": True,
}


def tiny_config(family: str, **sizes: int) -> PretrainedConfig:
    """A family's config with every size small; `sizes` are those of a case of its own."""
    return _small(CONFIG_MAPPING[family](), OWN.get(family, {}) | sizes)


def make_model(family: str, *, seed: int, **sizes: int) -> PreTrainedModel:
    """A random model of a family whose vectors, and rows of zeros as that of a padding token, are
    not what they begin with."""
    torch.manual_seed(seed)
    config = tiny_config(family, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    assert sum(p.numel() for p in model.parameters()) < LARGEST, f"{family} has a size unseen"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                plain = parameter.ndim < 2 or ~parameter.any(-1, keepdim=True)
                parameter.add_(0.1 * torch.randn_like(parameter) * plain)
    return model


def save_family(family: str, folder: Path, *, seed: int, **sizes: int) -> Path:
    """Save a random model of a family with the tiny tokenizer beside it."""
    make_model(family, seed=seed, **sizes).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def _small(default: PretrainedConfig, own: dict[str, Any]) -> PretrainedConfig:
    fields = dict(_sizes(vars(default)))
    for name, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            fields[name] = _small(part, own.get(name, {}))
    plain = {n: v for n, v in own.items() if not isinstance(fields.get(n), PretrainedConfig)}
    return type(default)(**fields | plain)


def _sizes(default: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    for name, present in default.items():
        if name in BY_NAME and isinstance(present, int | float):
            yield name, type(present)(BY_NAME[name])
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            yield name, BY_NAME[name]
    if "qk_rope_head_dim" in default and default.get("num_key_value_heads"):
        yield "num_key_value_heads", HEADS  # latent attention has no groups
