"""Latent attention, with experts and without."""

from typing import Any

from configs.common import LLAMA, STRETCHED

_LATENT = {
    **LLAMA,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
_EXPERTS = {
    **_LATENT,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
_V2 = {**_EXPERTS, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
_V3 = {**_EXPERTS, "model_type": "deepseek_v3"}
_MINICPM3 = {
    **_LATENT,
    "model_type": "minicpm3",
    "scale_emb": 3,
    "scale_depth": 1.1,
    "dim_model_base": 11,
}
_YARN = {"rope_type": "yarn", **STRETCHED}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2_groups_yarn": {
        **_V2,
        "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
    },
    "deepseek_v2_greedy_direct_queries": {
        **_V2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "num_experts_per_tok": 8,
        "v_head_dim": 12,
        "tie_word_embeddings": True,
    },
    "deepseek_v2_biases_one_layer": {
        **_V2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "first_k_dense_replace": 0,
        "n_routed_experts": 40,
        "num_experts_per_tok": 1,
        "attention_bias": True,
        "n_shared_experts": 1,
    },
    "deepseek_v3_groups": _V3,
    "deepseek_v3_halves_direct_queries_yarn": {
        **_V3,
        "q_lora_rank": None,
        "rope_interleave": False,
        "norm_topk_prob": False,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        "qk_nope_head_dim": 3,
        "v_head_dim": 9,
    },
    "deepseek_v3_one_group_biases_one_layer": {
        **_V3,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "routed_scaling_factor": 1.0,
    },
    "minicpm3_multipliers": {**_MINICPM3, "q_lora_rank": 9},
    "minicpm3_longrope_direct_queries": {
        **_MINICPM3,
        "q_lora_rank": None,
        "v_head_dim": None,
        "tie_word_embeddings": False,
        "qk_rope_head_dim": 6,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.3, 2.0],
            "long_factor": [1.2, 2.0, 4.0],
            "original_max_position_embeddings": 256,
        },
    },
    "minicpm3_biases_one_layer_unscaled": {
        **_MINICPM3,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "scale_depth": None,
        "dim_model_base": None,
    },
}
