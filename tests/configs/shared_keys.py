"""Keys and values that layers share: Gemma 4."""

from typing import Any

from configs.common import LLAMA

_ROPE = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 50000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
_GEMMA4 = {
    **LLAMA,
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "intermediate_size": 40,
    "head_dim": 8,
    "sliding_window": 8,
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "rope_parameters": _ROPE,
}

_GEMMA3N = {
    **{key: x for key, x in _GEMMA4.items() if key != "rope_parameters"},
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 100,  # tokens beyond have that of token 0
    "activation_sparsity_pattern": [0.8, 0.0, 0.6, 0.0],
    "altup_num_inputs": 3,
    "altup_active_idx": 1,
    "laurel_rank": 5,
    "final_logit_softcapping": 4.0,
    "rope_theta": 50000.0,
    "rope_local_base_freq": 5000.0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4_shared_keys": {
        **_GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "global_head_dim": 12,
        "final_logit_softcapping": 4.0,
    },
    "gemma4_values_are_keys": {
        **_GEMMA4,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "tie_word_embeddings": False,
    },
    "gemma4_layer_config_default_ropes": {
        **_GEMMA4,
        "layer_types": ["full_attention", "full_attention"],
        "per_layer_config": {str(i): {"head_dim": 20, "num_key_value_heads": 4} for i in range(2)},
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 1,
        "rope_parameters": None,
    },
    "gemma4_experts": {
        **_GEMMA4,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
    "gemma3n_streams": _GEMMA3N,
    "gemma3n_widths_untied": {
        **_GEMMA3N,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "intermediate_size": [40, 24],
        "activation_sparsity_pattern": None,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "vocab_size_per_layer_input": 128,
        "tie_word_embeddings": False,
    },
    "gemma3n_one_stream_none_shared": {
        **_GEMMA3N,
        "num_hidden_layers": 2,
        "layer_types": None,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.9],
        "altup_num_inputs": 1,
        "altup_active_idx": 0,
    },
}
