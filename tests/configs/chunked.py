"""Layers that see chunks of a text, beside others that see all of it."""

from typing import Any

from configs.common import LLAMA

_LLAMA4 = {
    **LLAMA,
    "model_type": "llama4_text",
    "hidden_size": 32,
    "intermediate_size": 16,
    "intermediate_size_mlp": 40,
    "head_dim": 8,
    "num_local_experts": 4,
    "attention_chunk_size": 7,  # which divides no length that is tested
    "no_rope_layer_interval": 2,
    "floor_scale": 11,  # beyond the test of padding, which the reference counts here, and only here
    "attn_scale": 0.4,
}
_STRETCHED = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama4_chunks_then_all": {
        **_LLAMA4,
        "rope_parameters": {
            **_STRETCHED,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,  # no ramp between them, as Scout has it
            "rope_theta": 10000.0,
        },
    },
    "llama4_dense_then_two_chosen_tied": {
        **_LLAMA4,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "no_rope_layers": [0, 1],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "llama4_all_chosen_one_layer": {
        **_LLAMA4,
        "num_hidden_layers": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "attention_chunk_size": 3,
    },
}
