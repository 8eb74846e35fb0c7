"""LayerNorm, parallel branches, learned positions, ALiBi: GPT-2 and what came after it."""

from typing import Any

from configs.common import GPT2, LLAMA, STRETCHED

_STARCODER2 = {**LLAMA, "model_type": "starcoder2", "sliding_window": 8}
_PHI: dict[str, Any] = {
    **LLAMA,
    "model_type": "phi",
    "num_key_value_heads": 4,
    "intermediate_size": 192,  # four times the width: llama.cpp's converter knows no other
}
_STABLELM = {**LLAMA, "model_type": "stablelm", "hidden_size": 64}
_COHERE = {**LLAMA, "model_type": "cohere", "logit_scale": 0.3}
_COHERE2 = {
    **_COHERE,
    "model_type": "cohere2",
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention"],
}
# Narrow: norms that scale by 2 make scores large, and float32 shows.
_NEMOTRON = {
    **LLAMA,
    "model_type": "nemotron",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_GPTJ = {
    **{key: value for key, value in GPT2.items() if key != "model_type"},
    "model_type": "gptj",
    "rotary_dim": 6,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}
_GPT_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 128,
    "hidden_size": 60,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 512,
    "rotary_pct": 0.35,  # of 12 channels 4 turn
}
_BLOOM = {
    "model_type": "bloom",
    "vocab_size": 128,
    "hidden_size": 60,
    "n_layer": 2,
    "n_head": 5,  # no power of two
    "seq_length": 512,
}
_FALCON = {
    "model_type": "falcon",
    "vocab_size": 128,
    "hidden_size": 48,
    "ffn_hidden_size": 192,  # llama.cpp knows no other
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "max_position_embeddings": 512,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2_tied": GPT2,
    "gpt2_untied_inner": {**GPT2, "n_inner": 100, "tie_word_embeddings": False},
    "gpt2_one_layer_one_head": {
        **GPT2,
        "n_layer": 1,
        "n_head": 1,
        "activation_function": "relu",
    },
    "starcoder2_window": _STARCODER2,
    "starcoder2_no_biases_untied": {
        **_STARCODER2,
        "num_key_value_heads": 1,
        "sliding_window": None,
        "use_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    },
    "starcoder2_linear_one_layer": {
        **_STARCODER2,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "phi_half_of_each_head": _PHI,
    "phi_query_key_norm_grouped": {
        **_PHI,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "qk_layernorm": True,
        "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.4},
    },
    "phi_whole_heads_one_layer": {
        **_PHI,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
    },
    "stablelm_quarter_of_each_head": _STABLELM,
    "stablelm_parallel_biases": {
        **_STABLELM,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.4,
    },
    "stablelm_norm_of_each_head": {
        **_STABLELM,
        "num_attention_heads": 8,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "stablelm_llama3_one_layer": {
        **_STABLELM,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "partial_rotary_factor": 0.75,
            **STRETCHED,
        },
    },
    "cohere_pairs": _COHERE,
    "cohere_query_key_norm_untied": {
        **_COHERE,
        "num_key_value_heads": 1,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
    "cohere_biases_linear_one_layer": {
        **_COHERE,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "cohere2_full_layer_first": _COHERE2,
    "cohere2_default_pattern": {
        **_COHERE2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "layer_types": None,
    },
    "cohere2_one_layer_without_positions": {
        **_COHERE2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "layer_types": ["full_attention"],
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "nemotron_half_of_each_head": _NEMOTRON,
    "nemotron_biases_tied_head_size": {
        **_NEMOTRON,
        "num_key_value_heads": 2,
        "head_dim": 18,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.25,
    },
    "nemotron_one_layer_linear": {
        **_NEMOTRON,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 5000.0,
            "partial_rotary_factor": 1.0,
        },
    },
    "gptj_half_of_each_head": _GPTJ,
    "gptj_third_of_each_head": {**_GPTJ, "n_inner": 100, "rotary_dim": 4},
    "gptj_one_layer_one_whole_head": {
        **_GPTJ,
        "n_layer": 1,
        "n_head": 1,
        "rotary_dim": 48,
        "activation_function": "relu",
    },
    "opt_norms_before": _OPT,
    "opt_norms_behind_narrow_embedding": {
        **_OPT,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 20,
    },
    "opt_one_layer_without_weights": {
        **_OPT,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    "gpt_neox_five_heads": _GPT_NEOX,
    "gpt_neox_serial_theta": {
        **_GPT_NEOX,
        "use_parallel_residual": False,
        "num_attention_heads": 2,
        "rotary_pct": 1.0,
        "rotary_emb_base": 700,
        "hidden_act": "gelu_fast",
    },
    "gpt_neox_no_biases_tied": {
        **_GPT_NEOX,
        "num_hidden_layers": 1,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 0.5, **STRETCHED},
    },
    "bloom_five_heads": _BLOOM,
    "bloom_twelve_heads_untied": {
        **_BLOOM,
        "hidden_size": 48,
        "n_head": 12,
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
    },
    "bloom_one_layer_two_heads": {**_BLOOM, "hidden_size": 48, "n_layer": 1, "n_head": 2},
    "falcon_grouped_two_norms": {**_FALCON, "new_decoder_architecture": True},
    "falcon_multi_query_untied": {
        **_FALCON,
        "num_kv_heads": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    },
    "falcon_serial_alibi_biases": {
        **_FALCON,
        "num_attention_heads": 12,  # no power of two, and slopes that rounding moves
        "num_kv_heads": 12,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "ffn_hidden_size": 80,
    },
    "falcon_grouped_one_norm_one_layer": {
        **_FALCON,
        "num_hidden_layers": 1,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 80,
        "activation": "relu",
    },
}
