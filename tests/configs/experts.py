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
}
