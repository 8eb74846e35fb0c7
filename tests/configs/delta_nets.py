"""Delta nets in the place of attention, in most layers."""

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
_KIMI = {key: x for key, x in LLAMA.items() if key not in ("rope_parameters", "intermediate_size")}
del _KIMI["max_position_embeddings"]
_KIMI |= {
    "model_type": "kimi_linear",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "model_max_length": 512,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
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
    "kimi_linear_nets_then_attention": {
        **_KIMI,
        "first_k_dense_replace": 1,
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1],
            "head_dim": 8,
            "num_heads": 3,
            "short_conv_kernel_size": 4,
        },
    },
    "kimi_linear_groups_latent_queries": {
        **_KIMI,
        "layer_types": ["full_attention", "linear_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
        "q_lora_rank": 10,
        "attention_bias": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "linear_head_dim": 6,
        "linear_num_heads": 1,
        "linear_conv_kernel_dim": 2,
    },
    "kimi_linear_wide_kernel_all_chosen": {
        **_KIMI,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "moe_renormalize": False,
        "hidden_act": "gelu_pytorch_tanh",
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "linear_conv_kernel_dim": 5,
    },
}
