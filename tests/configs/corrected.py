"""Experts whose scores are corrected before some are chosen, beside one that all tokens take."""

from typing import Any

from configs.common import LLAMA

_GLM4_MOE = {
    **LLAMA,
    "model_type": "glm4_moe",
    "hidden_size": 32,
    "intermediate_size": 40,
    "head_dim": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_ERNIE4_5_MOE = {
    **LLAMA,
    "model_type": "ernie4_5_moe",
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "glm4_moe_groups": {
        **_GLM4_MOE,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "glm4_moe_one_chosen": {
        **_GLM4_MOE,
        "n_routed_experts": 40,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    },
    "glm4_moe_all_chosen_two_shared": {
        **_GLM4_MOE,
        "n_routed_experts": 4,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 2,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "ernie4_5_moe_two_shared_least_sum": {
        **_ERNIE4_5_MOE,
        "moe_norm_min": 0.5,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    "ernie4_5_moe_one_chosen": {
        **_ERNIE4_5_MOE,
        "moe_num_experts": 40,
        "moe_k": 1,
        "moe_norm_min": 0.2,  # else the only weight is one
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    },
    "ernie4_5_moe_all_chosen_between": {
        **_ERNIE4_5_MOE,
        "moe_num_experts": 3,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 0,
        "num_key_value_heads": 4,
    },
}
