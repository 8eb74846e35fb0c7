"""Sinks, experts with biases and a clamp."""

from typing import Any

from configs.common import LLAMA

_GPT_OSS = {
    **LLAMA,
    "model_type": "gpt_oss",
    "hidden_size": 32,  # MXFP4 has 32 numbers in a block
    "intermediate_size": 32,
    "head_dim": 12,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 0.3,  # which is reached
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_oss_clamped": _GPT_OSS,
    "gpt_oss_more_experts_than_tokens": {
        **_GPT_OSS,
        "num_local_experts": 80,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "swiglu_limit": 7.0,
        "swiglu_alpha": 0.9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "gpt_oss_all_chosen_no_biases_tied": {
        **_GPT_OSS,
        "num_hidden_layers": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "swiglu_limit": 0.05,
        "rope_parameters": None,
    },
}
