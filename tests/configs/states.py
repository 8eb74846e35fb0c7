"""States in the place of keys and values."""

from typing import Any

from configs.common import LLAMA

_LFM2 = {
    **{key: x for key, x in LLAMA.items() if key != "rope_parameters"},
    "model_type": "lfm2",
    "rope_theta": 10000.0,
    "layer_types": ["conv", "full_attention"],
}
_LFM2_MOE = {
    **_LFM2,
    "model_type": "lfm2_moe",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LFM3 = {
    **{key: x for key, x in LLAMA.items() if key != "rope_parameters"},
    "model_type": "lfm3",
    "hidden_size": 32,
    "intermediate_size": 40,
    "head_dim": 12,
    "layer_types": ["conv", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "sliding_window": 7,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2_wide_kernel": {
        **_LFM2,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 5,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_untied": {
        **_LFM2,
        "layer_types": ["full_attention", "conv"],
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.3,
        "tie_word_embeddings": False,
    },
    "lfm2_old_keys": {
        **{key: x for key, x in _LFM2.items() if key != "layer_types"},
        "full_attn_idxs": [1],
        "block_ff_dim": 100,
        "block_multiple_of": 16,
        "conv_L_cache": 2,
        "tie_embedding": True,
        "num_key_value_heads": 1,
    },
    "lfm2_moe_scaled_after_dense": {
        **_LFM2_MOE,
        "num_dense_layers": 1,
        "routed_scaling_factor": 2.5,
        "conv_L_cache": 4,
    },
    "lfm2_moe_one_chosen_uncorrected_untied": {
        **_LFM2_MOE,
        "layer_types": ["full_attention", "conv"],
        "num_experts": 40,
        "num_experts_per_tok": 1,
        "num_dense_layers": 0,
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "lfm2_moe_all_chosen": {
        **_LFM2_MOE,
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "num_dense_layers": 0,
        "conv_L_cache": 2,
        "tie_embedding": True,
    },
    "lfm3_two_kinds_of_attention": _LFM3,
    "lfm3_no_gates_no_norms_behind_biases": {
        **_LFM3,
        "num_hidden_layers": 2,
        "layer_types": ["conv", "sliding_attention"],
        "use_attention_gate": False,
        "use_sandwich_norm": False,
        "attention_bias": True,
        "conv_L_cache": 2,
        "tie_word_embeddings": False,
    },
    "lfm3_third_of_channels_multi_query": {
        **_LFM3,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "conv"],
        "num_key_value_heads": 1,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.4,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
}
