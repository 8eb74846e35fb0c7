"""State spaces: Mamba-2, and models that have it beside attention."""

from typing import Any

from configs.common import GRANITE

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

_GRANITE = {
    **{key: x for key, x in GRANITE.items() if key != "rope_parameters"},
    "model_type": "granitemoehybrid",
    "hidden_size": 32,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_state": 6,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 40,
    "mamba_chunk_size": 16,
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
    "granitemoehybrid_experts": {
        **_GRANITE,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "mamba_n_groups": 2,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "time_step_limit": [0.0, 1.2],
        "position_embedding_type": "nope",
    },
    "granitemoehybrid_attention_alone_rope": {
        **_GRANITE,
        "layer_types": ["attention", "attention"],
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": True,
    },
    "granitemoehybrid_states_first_and_last": {
        **_GRANITE,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_d_head": 4,
        "mamba_expand": 1,
        "mamba_d_conv": 3,
        "mamba_conv_bias": False,
        "num_key_value_heads": 1,
    },
}
