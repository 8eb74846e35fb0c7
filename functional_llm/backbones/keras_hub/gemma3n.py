"""KerasHub's column of Gemma 3n."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from functional_llm.backbones.gemma3n_keys import check_numbers
from functional_llm.backbones.keras_hub.column import OURS, REQUIRED, KerasHub, dense, one
from functional_llm.backbones.sharing import lenders
from functional_llm.backbones.transforms import Rows
from functional_llm.graph.types import JSON

# Argument -> our field.
_RENAMED = {
    "text_vocab_size": "vocabulary_size",
    "text_hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "hidden_activation": "activation",
    "rope_theta": "rope_max_wavelength",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size_per_layer_input": "per_layer_vocabulary",
    "hidden_size_per_layer_input": "per_layer_width",
    "altup_num_inputs": "streams",
    "altup_active_idx": "active_stream",
    "altup_correct_scale": "scales_stream",
    "rope_local_base_freq": "local_rope_max_wavelength",
    "num_kv_shared_layers": "borrowing_layers",
    "rms_norm_eps": "layer_norm_epsilon",
}
_COUNTS = ["text_vocab_size", "text_hidden_size", "num_hidden_layers", "num_attention_heads"]
_COUNTS += ["vocab_size_per_layer_input", "hidden_size_per_layer_input", "altup_num_inputs"]
# Of training, and of encoders.
_NOT_READ: JSON = {
    "attention_dropout": 0.0,
    "altup_coef_clip": None,
    "vision_hidden_size": 2048,
    "vision_vocab_size": 128,
    "vision_vocab_offset": 100,
    "vision_soft_tokens_per_image": 256,
    "image_token_id": 98,
    "audio_hidden_size": 32,
    "audio_vocab_size": 128,
    "audio_vocab_offset": 228,
    "audio_soft_tokens_per_image": 188,
    "audio_token_id": 99,
}
_ARGUMENTS: JSON = {
    **dict.fromkeys([*_RENAMED, "num_key_value_heads", "head_dim", "laurel_rank"], REQUIRED),
    **dict.fromkeys(["pad_token_id", "layer_types", "sliding_window"], REQUIRED),
    "intermediate_size": REQUIRED,
    **_NOT_READ,
    "attention_bias": False,
    "rope_scaling": None,  # which would stretch the layers with windows, too
    "vision_encoder_config": None,
    "audio_encoder_config": None,
    "rope_local_base_freq": 10000.0,
    "activation_sparsity_pattern": None,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "num_kv_shared_layers": 0,
    "final_logit_soft_cap": None,
    "rms_norm_eps": 1e-6,
}


def _fields(x: JSON) -> JSON:
    """Returns the fields of our config that are no argument, or another number."""
    widths = tuple(x["intermediate_size"])
    shares = x["activation_sparsity_pattern"] or [0.0] * x["num_hidden_layers"]
    check_numbers({**x, "mlp_widths": widths, "activation_sparsity_pattern": shares})
    return {
        "layer_types": tuple(x["layer_types"]),
        "intermediate_dim": widths[0],
        "mlp_widths": widths,
        "sparse_shares": tuple(shares),
        "activation": "gelu_approximate",
        "rope_scaling": None,
        "tie_word_embeddings": True,
    }


def _written(config: Any) -> JSON:
    return {
        "pad_token_id": 0,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window or 512,
        "intermediate_size": list(config.mlp_widths),
        "activation_sparsity_pattern": list(config.sparse_shares),
    }


_PROCESSOR = "layers/gemma3n_multimodal_embedding_processor"
_MODEL = f"{_PROCESSOR}/language_model"
_LAYER = f"{_MODEL}/transformer_layers/gemma3n_text_decoder_block"
# In a layer: a Dense, or a norm.
_DENSE = {
    **{f"attention/{x[0]}_proj": f"attention/{x}" for x in ("query", "key", "value", "output")},
    **{f"mlp/{x}_proj": f"mlp/{x}" for x in ("gate", "up", "down")},
    "altup/modality_router": "altup_router",
    "altup/prediction_coefs": "altup_prediction",
    "altup/correction_coefs": "altup_correction",
    "laurel/linear_left": "laurel/left",
    "laurel/linear_right": "laurel/right",
    "per_layer_input_gate": "per_layer/gate",
    "per_layer_projection": "per_layer/projection",
}
_NORMS = {
    "attention/q_norm": "attention/query_norm",
    "attention/k_norm": "attention/key_norm",
    "altup": "altup_scale",  # a scale as well
    "altup/router_norm": "altup_norm",
    "laurel/post_laurel_norm": "laurel/norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "post_per_layer_input_norm": "per_layer_post_norm",
}


def _weights(config: Any) -> Rows:
    streams = {"altup_projections": "altup_projection"}
    streams["altup_unembed_projections"] = "altup_unembedding"
    layer = _LAYER + "_{}"
    return [
        one(f"{_MODEL}/embed_tokens/embedding", "token_embedding/embeddings"),
        one(f"{_MODEL}/embed_tokens_per_layer/embedding", "per_layer_embedding/embeddings"),
        *dense(f"{_MODEL}/per_layer_model_projection", "per_layer_projection"),
        one(f"{_MODEL}/per_layer_projection_norm", "per_layer_norm/scale"),
        one(f"{_MODEL}/final_normalization", "final_norm/scale"),
        *(
            row
            for theirs, ours in streams.items()
            for i in range(config.streams - 1)
            for row in dense(f"{_MODEL}/{theirs}/dense_{i}", f"{ours}_{i}")
        ),
        *(one(f"{layer}/{theirs}", f"{OURS}/{ours}/scale") for theirs, ours in _NORMS.items()),
        *(
            row
            for theirs, ours in _DENSE.items()
            for row in dense(f"{layer}/{theirs}", f"{OURS}/{ours}")
        ),
    ]


def _unused(config: Any) -> Mapping[str, np.ndarray]:
    """Returns the keys and values of layers that borrow them: KerasHub has weights for them."""
    width, size = config.num_key_value_heads * config.head_dim, config.head_dim
    shapes = {"k_proj": (config.hidden_dim, width), "v_proj": (config.hidden_dim, width)}
    return {
        f"{_LAYER}_{i}/attention/{part}/vars/0": np.zeros(shape, "float32")
        for i in lenders(config.layer_types, config.borrowing_layers)
        for part, shape in {**shapes, "k_norm": (size,)}.items()
    }


GEMMA3N = KerasHub(
    classes=("Gemma3nBackbone",),
    arguments=_ARGUMENTS,
    renamed=_RENAMED,
    fields=_fields,
    written=_written,
    weights=_weights,
    ignored=[*_NOT_READ, "pad_token_id"],
    types={
        **dict.fromkeys(_COUNTS, int),
        "layer_types": tuple[str, ...],
        "intermediate_size": tuple[int, ...],
        "activation_sparsity_pattern": tuple[float, ...],
        "hidden_activation": str,
        "rope_scaling": float,
    },
    computed=_unused,
    encoders={
        f"{x}_encoder_config": [f"{_PROCESSOR}/{x}_encoder", f"{_PROCESSOR}/embed_{x}"]
        for x in ("vision", "audio")
    },
)
