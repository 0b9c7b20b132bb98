"""Random models of several families, small enough for the tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from shared.data.rows import Rows
from tests.teacher_service.scripted import VOCAB

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 3, "n_head": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
# Whose layers a plan of transformers spreads, beside some of those above.
SPREAD: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "head_dim": 8},
}  # fmt: skip


def save_family(family: str, folder: Path) -> Path:
    """Save a random model of a family, with a head whose logits are far from flat."""
    torch.manual_seed(3)
    own = (FAMILIES | SPREAD)[family]
    config = transformers.AutoConfig.for_model(family, **(SIZES | own))
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def documents(rows: Rows) -> list[np.ndarray]:
    """Every document of every row, in order."""
    columns = (rows.column(name) for name in ("input_ids", "doc_starts"))
    return [
        part for ids, starts in zip(*columns, strict=True) for part in np.split(ids, starts[1:])
    ]
