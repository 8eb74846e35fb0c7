"""Root mean square norms before each branch: Llama and its kin."""

from typing import Any

from configs.common import GRANITE, LLAMA, STRETCHED, llama

_MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
_QWEN2 = {**LLAMA, "model_type": "qwen2"}
_QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 20}
_SMOLLM3 = {
    **LLAMA,
    "model_type": "smollm3",
    "no_rope_layers": [1, 0],
    "tie_word_embeddings": False,
}
_SEED_OSS = {**LLAMA, "model_type": "seed_oss", "head_dim": 20}
_APERTUS = {**LLAMA, "model_type": "apertus", "rope_parameters": None}
_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
_HUNYUAN = {
    **LLAMA,
    "model_type": "hunyuan_v1_dense",
    "head_dim": 20,
    "rope_parameters": _ALPHA,
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
    **LLAMA,
    "model_type": "ministral3",
    "head_dim": 20,
    "rope_parameters": _GROWING,
}
_ERNIE = {**LLAMA, "model_type": "ernie4_5", "head_dim": 20}
_PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama_grouped": llama(),
    "llama_multi_head_tied": llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama_multi_query_one_layer": llama(num_key_value_heads=1, num_hidden_layers=1),
    "llama_head_size": llama(head_dim=18, num_attention_heads=6, num_key_value_heads=3),
    "llama_biases": llama(attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama_llama3": llama(
        rope_parameters={
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **STRETCHED,
        }
    ),
    "llama_linear": llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        tie_word_embeddings=True,
    ),
    "llama_yarn": llama(rope_parameters={"rope_type": "yarn", **STRETCHED}),
    "llama_yarn_mscale": llama(
        rope_parameters={
            "rope_type": "yarn",
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            **STRETCHED,
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
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
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
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
    },
    "smollm3_all_nope_multi_query": {
        **_SMOLLM3,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "no_rope_layers": [0, 1],
    },
    "granite_multipliers": GRANITE,
    "granite_biases_tied": {
        **GRANITE,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "granite_small_multipliers_multi_query": {
        **GRANITE,
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
    "apertus_default_rope": _APERTUS,
    "apertus_llama3_biases_tied": {
        **_APERTUS,
        "num_key_value_heads": 4,
        "head_dim": 20,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **STRETCHED,
        },
    },
    "apertus_one_layer_multi_query": {
        **_APERTUS,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
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
        "rope_parameters": {"rope_type": "yarn", **STRETCHED},
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
}
