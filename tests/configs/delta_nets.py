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
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,  # torch multiplies experts in bfloat16 by eights
    "shared_expert_intermediate_size": 28,
}
_QWEN3_NEXT = {**_QWEN3_5, **_EXPERTS, "model_type": "qwen3_next"}
_QWEN3_NEXT["rope_parameters"] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_QWEN3_5_MOE = {**_QWEN3_5, **_EXPERTS, "model_type": "qwen3_5_moe_text"}
del _QWEN3_5_MOE["intermediate_size"]

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
    "qwen3_next_grouped_values": _QWEN3_NEXT,
    "qwen3_next_some_dense_tied": {
        **_QWEN3_NEXT,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_next_every_second_all_chosen": {
        **{key: x for key, x in _QWEN3_NEXT.items() if key != "layer_types"},
        "full_attention_interval": 2,
        "decoder_sparse_step": 2,
        "num_experts_per_tok": 6,
        "linear_conv_kernel_dim": 3,
        "linear_num_key_heads": 1,
    },
    "qwen3_5_moe_grouped_values": _QWEN3_5_MOE,
    "qwen3_5_moe_one_chosen_tied": {
        **_QWEN3_5_MOE,
        "layer_types": ["full_attention", "linear_attention"],
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "linear_num_key_heads": 1,
    },
    "qwen3_5_moe_all_chosen_no_groups": {
        **_QWEN3_5_MOE,
        "num_experts_per_tok": 6,
        "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 3,
    },
}
