"""Units of models that let neighbours, padding or a pass's longest row in: every answer is that of
its document alone."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.data.passes import Passes
from shared.data.trust import Trust
from shared.errors import ConfigError
from teacher_service.engine.hf import HFEngine
from tests.answers import decoded, question_of
from tests.teacher_service.engine.test_hf import by_id, dense
from tests.teacher_service.scripted import make_rows

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SWITCH = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 6.0, 10.0, 14.0],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# What every type of rotary embedding of transformers needs beside its base.
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "longrope": LONGROPE,
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
FULL = question_of(top_k=VOCAB, shared_vocab=VOCAB, encoding="fp32")


def saved(folder, config, *, scale=1.0):
    """A random model of a config, its matrices scaled."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(scale)
    model.save_pretrained(folder)
    return str(folder)


def longrope(folder, **options):
    config = transformers.Phi3Config(
        **(SIZES | options), rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH
    )
    return saved(folder, config, scale=8.0)


def assert_alone(engine, folder, lengths, *, dtype="float32", atol=2e-4):
    """The engine's answers are those of plain transformers to every document alone."""
    rows = make_rows(lengths, vocab=VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    found_NV = by_id(decoded(engine.score(rows, FULL)))
    np.testing.assert_allclose(found_NV, dense(model, rows), atol=atol)


def test_rows_on_both_sides_of_longropes_switch_share_a_unit_and_no_pass(tmp_path):
    folder = longrope(tmp_path)
    engine = HFEngine.load(folder, context=200)
    assert engine.trust == Trust(packed=True, passes=Passes(switches=(SWITCH,)))
    assert_alone(engine, folder, [[20], [90], [30, 30], [64], [65], [10, 100, 12], [70, 80]])
    assert "apart from longer ones" in engine.fingerprint["passes"]
    assert "apart from longer ones" in engine.notes[0]


def test_hidden_states_of_several_passes_are_in_their_order(tmp_path):
    engine = HFEngine.load(longrope(tmp_path), context=200)
    asked = question_of(4, VOCAB, hidden_layers=(0, 1, 2), hidden_encoding="fp32")
    rows = make_rows([[90], [20], [10, 100]], vocab=VOCAB)
    together = engine.score(rows, asked).arrays().hidden_ND
    alone = [engine.score(rows.part(slice(r, r + 1)), asked).arrays().hidden_ND for r in range(3)]
    for layer, states_ND in together.items():
        expected_ND = np.concatenate([each[layer] for each in alone])
        np.testing.assert_allclose(states_ND, expected_ND, atol=1e-4)


def test_padding_raises_no_position(tmp_path):
    """A context below the switch, padded beyond it."""
    folder = longrope(tmp_path)
    engine = HFEngine.load(folder, context=SWITCH)
    assert engine.trust == Trust(packed=True)
    assert "passes" not in engine.fingerprint
    assert_alone(engine, folder, [[3], [33, 31], [60], [35]])


def test_a_row_beyond_the_probed_context_is_refused_where_it_is_read_otherwise(tmp_path):
    folder = longrope(tmp_path)
    engine = HFEngine.load(folder, context=SWITCH)
    for _ in range(2):  # also where the same unit is asked again
        with pytest.raises(ConfigError, match=r"a row of 80 tokens.*data\.context=80"):
            engine.score(make_rows([[80]], vocab=VOCAB), FULL)
    plain = HFEngine.load(saved(tmp_path / "plain", transformers.LlamaConfig(**SIZES)), context=32)
    plain.score(make_rows([[300]], vocab=VOCAB), FULL)


def test_dynamic_factors_never_grow_by_padding(tmp_path):
    """They would for 50 tokens, padded to 64, of a model that reads 48 or 50."""
    sizes = SIZES | {"max_position_embeddings": 50}
    folder = saved(tmp_path, transformers.LlamaConfig(**sizes, rope_parameters=DYNAMIC), scale=8.0)
    engine = HFEngine.load(folder, context=50)
    assert engine.trust == Trust(packed=True)
    for lengths in ([[50], [7]], [[49]], [[20, 30], [50]], [[33]]):
        assert_alone(engine, folder, lengths)


@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_no_type_of_rotary_embedding_reads_a_row_by_its_unit(tmp_path, kind):
    parameters = {"rope_theta": 10000.0} | ROPES[kind] | {"rope_type": kind}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=parameters)
    folder = saved(tmp_path, config, scale=8.0)
    engine = HFEngine.load(folder, context=200)
    assert_alone(engine, folder, [[20], [90], [30, 30], [64], [65], [10, 100, 12], [200]])


LEAKY = {
    "recurrent gemma": transformers.RecurrentGemmaConfig(
        **{k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
        | {"num_key_value_heads": 1, "num_hidden_layers": 3},
        lru_width=32,
        logits_soft_cap=1e6,
        attention_window_size=64,
    ),
    "lfm2": transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "sparse": transformers.DeepseekV32Config(
        **SIZES,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        index_topk=16,
        index_n_heads=2,
        index_head_dim=16,
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", LEAKY)
def test_documents_that_would_leak_are_scored_one_by_one(tmp_path, family, dtype):
    folder = saved(tmp_path, LEAKY[family], scale=2.0)
    engine = HFEngine.load(folder, dtype=dtype, context=128)
    assert not engine.trust.packed
    assert engine.fingerprint["packed"] == "False"
    atol = 2e-4 if dtype == "float32" else 0.15
    assert_alone(engine, folder, [[20, 40, 30], [100], [50, 60]], dtype=dtype, atol=atol)


def test_an_index_that_reaches_every_key_of_a_line_packs(tmp_path):
    longer = {"index_topk": 512}
    config = transformers.DeepseekV32Config(**(LEAKY["sparse"].to_dict() | longer))
    folder = saved(tmp_path, config, scale=2.0)
    engine = HFEngine.load(folder, context=128)
    assert engine.trust == Trust(packed=True)
    assert_alone(engine, folder, [[20, 40, 30], [100], [50, 60]])
