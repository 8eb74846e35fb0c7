"""State spaces: Mamba-2, and models that have it beside attention."""

from typing import Any

_MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 128,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "n_groups": 3,
    "state_size": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2_groups": {**_MAMBA2, "chunk_size": 16},
    "mamba2_clamped_steps_biases": {
        **_MAMBA2,
        "expand": 1,
        "num_heads": 3,
        "n_groups": 1,
        "time_step_limit": [0.02, 0.1],  # both ends of which are reached
        "use_bias": True,
        "conv_kernel": 2,
        "chunk_size": 7,
        "residual_in_fp32": False,
        "tie_word_embeddings": True,
    },
    "mamba2_one_layer_no_convolution_bias": {
        **_MAMBA2,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "head_dim": 12,
        "n_groups": 4,
        "state_size": 16,
        "use_conv_bias": False,
        "layer_norm_epsilon": 1e-3,
    },
}
