"""Norms behind the branches: Gemma, OLMo 2 and 3, EXAONE 4, GLM-4."""

from typing import Any

from configs.common import LLAMA, STRETCHED

_OLMO2 = {**LLAMA, "model_type": "olmo2"}
_OLMO3 = {
    **_OLMO2,
    "model_type": "olmo3",
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}
        | {"original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
_EXAONE4 = {
    **LLAMA,
    "model_type": "exaone4",
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA = {**LLAMA, "model_type": "gemma", "head_dim": 16}
_GEMMA2 = {
    **_GEMMA,
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_GEMMA3 = {
    **_GEMMA,
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
_GLM4: dict[str, Any] = {
    **LLAMA,
    "model_type": "glm4",
    "head_dim": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "olmo2_norms_over_all_heads": _OLMO2,
    "olmo2_tied_yarn_multi_head": {
        **_OLMO2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
    },
    "olmo2_biases_head_size_multi_query": {
        **_OLMO2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "attention_bias": True,
    },
    "olmo3_yarn_in_full_layers": _OLMO3,
    "olmo3_default_pattern": {
        **_OLMO3,
        "num_hidden_layers": 4,
        "layer_types": None,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "olmo3_one_sliding_layer_biases": {
        **_OLMO3,
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "exaone4_nope_in_full_layers": _EXAONE4,
    "exaone4_no_window_tied": {
        **_EXAONE4,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "exaone4_pattern_llama3_multi_query": {
        **_EXAONE4,
        "layer_types": None,
        "sliding_window_pattern": 2,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **STRETCHED,
        },
    },
    "gemma_grouped": _GEMMA,
    "gemma_untied_multi_head": {**_GEMMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gemma_one_layer_multi_query": {**_GEMMA, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "gemma2_soft_caps": _GEMMA2,
    "gemma2_no_caps_untied": {
        **_GEMMA2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "gemma2_one_sliding_layer": {**_GEMMA2, "num_hidden_layers": 1, "num_key_value_heads": 4},
    "gemma3_two_ropes": _GEMMA3,
    "gemma3_default_pattern": {
        **_GEMMA3,
        "num_hidden_layers": 7,
        "layer_types": None,
        "num_key_value_heads": 1,
    },
    "gemma3_one_layer_capped": {
        **_GEMMA3,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_key_value_heads": 4,
        "final_logit_softcapping": 4.0,
    },
    "glm4_half_of_each_head": _GLM4,
    "glm4_no_biases_multi_head": {
        **_GLM4,
        "attention_bias": False,
        "num_key_value_heads": 4,
        "hidden_act": "gelu",
        "rope_parameters": {**_GLM4["rope_parameters"], "partial_rotary_factor": 0.9},
    },
    "glm4_tied_one_layer": {
        **_GLM4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
    },
}
