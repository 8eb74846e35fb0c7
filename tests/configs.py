"""The one list of tiny configs that the property tests run over.

An entry is the Transformers config of a random-weight model, under a name that says what is odd
about it. A new family or a new part joins here and gets every test.
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
}
