"""The one list of tiny configs that the property tests run over.

An entry is the Transformers config of a random-weight model, under a name that says what is odd
about it. A new family or a new part joins here and gets every test.

One more takes 3 s of a core (CPU seconds, two layers, programs kept from an earlier run): 1 s for
the properties, 2 s for stock files on one backend. A family's take the three backends in turn: give
it three. The first of a family gets what ONE_OF_EACH_FAMILY is for, too: 8 s in all. One that joins
ONE_OF_EACH_KIND takes 20 s more. `make nightly` takes all for all (tests/nightly.py).
"""

from typing import Any

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # the defaults of many families lie outside of so small a vocabulary
}

_MISTRAL = {**_LLAMA, "model_type": "mistral", "sliding_window": 8}
_QWEN2 = {**_LLAMA, "model_type": "qwen2"}
_QWEN3 = {**_LLAMA, "model_type": "qwen3", "head_dim": 20}
_SMOLLM3 = {
    **_LLAMA,
    "model_type": "smollm3",
    "no_rope_layers": [1, 0],
    "tie_word_embeddings": False,
}
_OLMO2 = {**_LLAMA, "model_type": "olmo2"}
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
_GRANITE = {
    **_LLAMA,
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.7,
}
_SEED_OSS = {**_LLAMA, "model_type": "seed_oss", "head_dim": 20}
_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
_HUNYUAN = {
    **_LLAMA,
    "model_type": "hunyuan_v1_dense",
    "head_dim": 20,
    "rope_parameters": _ALPHA,
}
_EXAONE4 = {
    **_LLAMA,
    "model_type": "exaone4",
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
    "llama_4_scaling_beta": 0.5,
}
_MINISTRAL3 = {
    **_LLAMA,
    "model_type": "ministral3",
    "head_dim": 20,
    "rope_parameters": _GROWING,
}
_GEMMA = {**_LLAMA, "model_type": "gemma", "head_dim": 16}
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
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 128,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_STARCODER2 = {**_LLAMA, "model_type": "starcoder2", "sliding_window": 8}
_PHI: dict[str, Any] = {
    **_LLAMA,
    "model_type": "phi",
    "num_key_value_heads": 4,
    "intermediate_size": 192,  # four times the width: llama.cpp's converter knows no other
}
_STABLELM = {**_LLAMA, "model_type": "stablelm", "hidden_size": 64}
_COHERE = {**_LLAMA, "model_type": "cohere", "logit_scale": 0.3}
_COHERE2 = {
    **_COHERE,
    "model_type": "cohere2",
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention"],
}
# Narrow: norms that scale by 2 make scores large, and float32 shows.
_NEMOTRON = {
    **_LLAMA,
    "model_type": "nemotron",
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_GPTJ = {
    **{key: value for key, value in _GPT2.items() if key != "model_type"},
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
_ERNIE = {**_LLAMA, "model_type": "ernie4_5", "head_dim": 20}
_GLM4: dict[str, Any] = {
    **_LLAMA,
    "model_type": "glm4",
    "head_dim": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
_PHI3 = {**_LLAMA, "model_type": "phi3", "pad_token_id": 0}
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


def _llama(**changes: Any) -> dict[str, Any]:
    return {**_LLAMA, **changes}


_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama_grouped": _llama(),
    "llama_multi_head_tied": _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama_multi_query_one_layer": _llama(num_key_value_heads=1, num_hidden_layers=1),
    "llama_head_size": _llama(head_dim=18, num_attention_heads=6, num_key_value_heads=3),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama_llama3": _llama(
        rope_parameters={
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_STRETCHED,
        }
    ),
    "llama_linear": _llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        tie_word_embeddings=True,
    ),
    "llama_yarn": _llama(rope_parameters={"rope_type": "yarn", **_STRETCHED}),
    "llama_yarn_mscale": _llama(
        rope_parameters={
            "rope_type": "yarn",
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            **_STRETCHED,
        }
    ),
    "mistral_window": _MISTRAL,
    "mistral_no_window_head_size": {
        **_MISTRAL,
        "sliding_window": None,
        "head_dim": 10,
        "num_key_value_heads": 4,
    },
    "mistral_window_of_one": {**_MISTRAL, "sliding_window": 1, "num_hidden_layers": 1},
    "qwen2_tied": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2_some_layers_slide": {
        **_QWEN2,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2_yarn_multi_query": {
        **_QWEN2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
    },
    "qwen3_head_size": _QWEN3,
    "qwen3_tied_multi_head": {**_QWEN3, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3_biases_slide_multi_query": {
        **_QWEN3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "num_hidden_layers": 1,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "smollm3_nope_slides": {
        **_SMOLLM3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "tie_word_embeddings": True,
    },
    "smollm3_every_second": {
        **_SMOLLM3,
        "no_rope_layers": None,
        "no_rope_layer_interval": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
    },
    "smollm3_all_nope_multi_query": {
        **_SMOLLM3,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "no_rope_layers": [0, 1],
    },
    "olmo2_norms_over_all_heads": _OLMO2,
    "olmo2_tied_yarn_multi_head": {
        **_OLMO2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
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
    "granite_multipliers": _GRANITE,
    "granite_biases_tied": {
        **_GRANITE,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "granite_small_multipliers_multi_query": {
        **_GRANITE,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "embedding_multiplier": 0.3,
        "logits_scaling": 0.4,
    },
    "seed_oss_biases_head_size": _SEED_OSS,
    "seed_oss_output_bias_only": {
        **_SEED_OSS,
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_dim": None,
        "num_key_value_heads": 4,
    },
    "seed_oss_tied_one_layer_multi_query": {
        **_SEED_OSS,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "hunyuan_alpha_norm_after_rope": _HUNYUAN,
    "hunyuan_tied_biases_no_scaling": {
        **_HUNYUAN,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "hunyuan_alpha_one_layer_multi_query": {
        **_HUNYUAN,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {**_ALPHA, "alpha": 1000.0},
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
            **_STRETCHED,
        },
    },
    "ministral3_growing_queries": _MINISTRAL3,
    "ministral3_window_tied": {
        **_MINISTRAL3,
        "sliding_window": 24,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "ministral3_one_layer_multi_query": {
        **_MINISTRAL3,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {**_GROWING, "mscale_all_dim": 0.0},
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
    "gpt2_tied": _GPT2,
    "gpt2_untied_inner": {**_GPT2, "n_inner": 100, "tie_word_embeddings": False},
    "gpt2_one_layer_one_head": {
        **_GPT2,
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
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
    },
    "stablelm_quarter_of_each_head": _STABLELM,
    "stablelm_parallel_biases": {
        **_STABLELM,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.4,
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
            **_STRETCHED,
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
    "ernie4_5_pairs_head_size": _ERNIE,
    "ernie4_5_biases_untied": {
        **_ERNIE,
        "num_key_value_heads": 4,
        "head_dim": None,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    "ernie4_5_yarn_one_layer": {
        **_ERNIE,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
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
        "rope_parameters": {"rope_type": "yarn", **_STRETCHED},
    },
    "phi3_long_texts": {
        **_PHI3,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.2, 2.0, 5.0, 9.0],
            "partial_rotary_factor": 0.7,
        },
    },
    "phi3_window_multi_head": {**_PHI3, "sliding_window": 8, "num_key_value_heads": 4},
    "phi3_tied_one_layer": {
        **_PHI3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 9.5],
            "attention_factor": 1.3,
        },
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
        "rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 0.5, **_STRETCHED},
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
# The first config of each family, for what no config changes.
ONE_OF_EACH_FAMILY = list({x["model_type"]: name for name, x in reversed(CONFIGS.items())}.values())
# One config for each kind of part, for what compiles and trains: adapters, int8, generation, stock
# files on three backends. Such numbers differ with parts, not with families. A new kind of layer or
# of tensor joins here: test_properties.py says what is missing.
ONE_OF_EACH_KIND = [
    "llama_grouped",  # the plain one: RMSNorm, gated MLP, RoPE, a head of its own, no bias
    "qwen2_tied",  # biases on some projections, the head is the embedding
    "gemma2_soft_caps",  # rings beside a full cache, soft caps, norms behind branches, scale 1 + w
    "gemma3_two_ropes",  # norms of queries and keys, a RoPE a type of layers
    "gpt2_tied",  # fused tensors, kernels as (in, out), learned positions, LayerNorm, a plain MLP
    "cohere_query_key_norm_untied",  # pairs turn, LayerNorm without a bias, a weight of each head
    "gptj_half_of_each_head",  # one norm for both branches, a head with a bias, some channels turn
    "gpt_neox_no_biases_tied",  # tensors fused in groups, one for each head
    "phi3_long_texts",  # fused tensors, transposed; a RoPE that depends on the longest row
    "bloom_five_heads",  # ALiBi
]
