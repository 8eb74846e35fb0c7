"""Experts: a router chooses some MLPs of many for each token."""

from typing import Any

from configs.common import GRANITE, LLAMA

_QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
_GRANITEMOE = {
    **GRANITE,
    "model_type": "granitemoe",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
_MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_QWEN2_MOE = {
    **LLAMA,
    "model_type": "qwen2_moe",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
}
_OLMOE = {
    **LLAMA,
    "model_type": "olmoe",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}

_PHIMOE = {
    **LLAMA,
    "model_type": "phimoe",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_local_experts": 6,
    "router_jitter_noise": 0.2,  # so near to the best are several, and not all
    "attention_bias": True,
    "lm_head_bias": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe_some_dense": {**_QWEN3_MOE, "mlp_only_layers": [1]},
    "qwen3_moe_more_experts_than_tokens": {
        **_QWEN3_MOE,
        "num_experts": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "qwen3_moe_all_chosen": {
        **_QWEN3_MOE,
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
        "attention_bias": True,
    },
    "granitemoe_multipliers": _GRANITEMOE,
    "granitemoe_one_of_eighty_tied": {
        **_GRANITEMOE,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "num_local_experts": 80,  # more than a row has tokens
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "granitemoe_all_chosen_biases": {
        **_GRANITEMOE,
        "num_key_value_heads": 4,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "attention_bias": True,
        "hidden_act": "gelu",
        "head_dim": 12,
    },
    "mixtral_two_of_five": {**_MIXTRAL, "head_dim": 12},
    "mixtral_one_of_ninety_slides": {
        **_MIXTRAL,
        "num_local_experts": 90,  # more than a row has tokens
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "sliding_window": 5,
    },
    "mixtral_all_chosen_tied": {
        **_MIXTRAL,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "qwen2_moe_some_dense": {**_QWEN2_MOE, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen2_moe_one_of_ninety_slides": {
        **_QWEN2_MOE,
        "num_experts": 90,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 1,
        "qkv_bias": False,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen2_moe_all_chosen_tied": {
        **_QWEN2_MOE,
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "olmoe_multi_head": {**_OLMOE, "num_key_value_heads": None},
    "olmoe_one_of_ninety_clipped": {
        **_OLMOE,
        "num_experts": 90,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "clip_qkv": 0.3,
        "attention_bias": True,
    },
    "olmoe_all_chosen_tied": {
        **_OLMOE,
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "phimoe_near_experts": _PHIMOE,
    "phimoe_long_texts_magnitudes": {
        **_PHIMOE,
        "num_key_value_heads": 4,
        "num_local_experts": 40,  # more than a row has tokens
        "router_jitter_noise": 0.01,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [1.0, 1.2, 1.5, 2.0],  # by which Transformers turns no text
            "short_mscale": 1.2,
            "long_mscale": 1.5,
            "original_max_position_embeddings": 256,
        },
    },
    "phimoe_all_chosen_no_biases_tied": {
        **_PHIMOE,
        "num_local_experts": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "attention_bias": False,
        "lm_head_bias": False,
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
}
