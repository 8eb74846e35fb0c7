"""Gated delta nets in the place of attention, in most layers."""

from typing import Any

from configs.common import LLAMA

_QWEN3_5 = {
    **LLAMA,
    "model_type": "qwen3_5_text",
    "hidden_size": 32,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_grouped_values": _QWEN3_5,
    "qwen3_5_tied_wide_kernel": {
        **{key: x for key, x in _QWEN3_5.items() if key not in ("layer_types", "rope_parameters")},
        "num_hidden_layers": 3,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
        "linear_conv_kernel_dim": 5,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_5_biases_after_attention": {
        **_QWEN3_5,
        "layer_types": ["full_attention", "linear_attention"],
        "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 2,
        "attention_bias": True,
        "num_key_value_heads": 1,
    },
}
