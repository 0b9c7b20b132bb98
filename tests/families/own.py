"""What a family's tiny config needs beside small sizes."""

from typing import Any

HEAD = {"head_dim": 8}
MIXED = ["sliding_attention", "full_attention"]
INDEXED = {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
           "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
           "indexer_compress_ratio": 4}  # fmt: skip
HYBRID = ["linear_attention", "full_attention"]
INKLING = {"unpadded_vocab_size": 512, "sliding_window_size": 8, "rel_extent": 8, "d_rel": 4,
           "n_layers_per_attn_res_block": 1}  # fmt: skip
BYTES = {"hidden_size_global": 64}

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID, "linear_head_dim": 8, "linear_num_heads": 4,
                       "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4],
            "encoder_config": BYTES, "decoder_config": BYTES, "global_config": {"hidden_size": 64}},
    "cohere_compass_text": {"layer_types": MIXED, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in MIXED}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "sparse"], "per_layer_config": {
            1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
            "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"downsample_hidden_size": 16, "adapter_input_size": 32,
                         "adapter_out_dim": 32}},
    "falcon": {"num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": MIXED,
                     "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "inkling2_text": INKLING,
    "inkling2_loop_text": INKLING
    | {"num_hidden_layers": 3, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
       "loop_gate_rank": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "ministral": HEAD,
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 8,
                         "depthwise_separable_out_channel": 32, "bias_max_distance": 8}},
    "qwen3_5": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16),
                 "attention_head_size": 8, "attn_layers": ("local", "lsh"), "num_buckets": 4,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 1},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64,
                 "pronunciation_vocab_size": 64},
    "xlm": {"emb_dim": 32},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16,
               "mamba_headdim": 8, "hybrid_layer_ids": [1, 2],
               "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
