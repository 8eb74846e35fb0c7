"""KerasHub's columns of the Gemmas."""

from collections.abc import Callable, Sequence
from typing import Any

from functional_llm.backbones.keras_hub.column import (
    EMBEDDING,
    OURS,
    REQUIRED,
    KerasHub,
    dense,
    divided,
    factor,
    has_window,
    one,
    window_fields,
)
from functional_llm.backbones.keras_hub.llamas import ARGUMENTS
from functional_llm.backbones.transforms import Rows, heads_first, split_axis
from functional_llm.graph.types import JSON

_ARGUMENTS = {
    **ARGUMENTS,
    "head_dim": REQUIRED,
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": False,
    "use_post_attention_norm": False,
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "use_sliding_window_attention": False,
    "sliding_window_size": 4096,
}


def _fields(arguments: JSON) -> JSON:
    return {
        "intermediate_dim": arguments["intermediate_dim"] // 2,  # KerasHub counts gate and up
        "activation": "gelu_approximate",
        "rope_max_wavelength": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "max_sequence_length": 8192,
    }


def _gemma2_fields(arguments: JSON, slides: Callable[[int], bool]) -> JSON:
    """Returns the fields of a Gemma 2 or 3 beside those of a Gemma.

    Args:
        arguments: All arguments of the class.
        slides: Whether the layer of a number has the window, if there is one.
    """
    window = arguments["use_sliding_window_attention"]
    size = arguments["hidden_dim"] // arguments["num_query_heads"]
    by_head = arguments["query_head_dim_normalize"]
    return {
        **window_fields(arguments, [window and slides(i) for i in range(arguments["num_layers"])]),
        "query_pre_attention_scalar": arguments["head_dim"] if by_head else size,
    }


def _gemma2_arguments(config: Any) -> JSON:
    return {
        "query_head_dim_normalize": config.query_pre_attention_scalar == config.head_dim,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": has_window(config),
        "sliding_window_size": config.sliding_window or 4096,
    }


def _wrong(config: Any) -> Sequence[str]:
    """Returns what the decoder layers do whatever the arguments say."""
    scalar = getattr(config, "query_pre_attention_scalar", config.head_dim)
    found = []
    if scalar != config.head_dim:
        found.append(f"it scales scores by the head size {config.head_dim} instead of {scalar}")
    if config.layer_norm_epsilon != 1e-6:
        found.append("the norms of its decoder layers have an epsilon of 1e-6")
    return found


NORMS = {
    "pre_attention_norm": "attention_norm",
    "post_attention_norm": "attention_post_norm",
    "pre_ffw_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attention/query_norm": "attention/query_norm",
    "attention/key_norm": "attention/key_norm",
}


def _weights(layer: str) -> Callable[[Any], Rows]:
    """Returns the weights, of the kind of the decoder layers."""
    block = f"layers/{layer}_{{}}"
    attend, theirs = f"{OURS}/attention", f"{block}/attention"

    def rows(config: Any) -> Rows:
        queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
        output = split_axis(0, (queries, size))
        return [
            EMBEDDING,
            *(one(f"{block}/{name}", f"{OURS}/{norm}/scale") for name, norm in NORMS.items()),
            *dense(f"{theirs}/query_dense", f"{attend}/query", heads_first(queries, size)),
            *dense(f"{theirs}/key_dense", f"{attend}/key", heads_first(keys, size)),
            *dense(f"{theirs}/value_dense", f"{attend}/value", heads_first(keys, size)),
            *dense(f"{theirs}/output_dense", f"{attend}/output", output),
            *dense(f"{block}/gating_ffw", f"{OURS}/mlp/gate"),
            *dense(f"{block}/gating_ffw_2", f"{OURS}/mlp/up"),
            *dense(f"{block}/ffw_linear", f"{OURS}/mlp/down"),
            one("layers/rms_normalization", "final_norm/scale"),
        ]

    return rows


GEMMA = KerasHub(
    classes=("GemmaBackbone",),
    arguments=_ARGUMENTS,
    fields=_fields,
    written=lambda config: {"intermediate_dim": 2 * config.intermediate_dim},
    weights=_weights("gemma_decoder_block"),
    wrong=_wrong,
    ignored=["sliding_window_size"],  # no layer has one
)

GEMMA2 = KerasHub(
    classes=("GemmaBackbone",),
    arguments=_ARGUMENTS,
    fields=lambda x: {**_fields(x), **_gemma2_fields(x, lambda i: i % 2 == 0)},
    written=lambda config: {
        **_gemma2_arguments(config),
        "intermediate_dim": 2 * config.intermediate_dim,
    },
    weights=_weights("gemma_decoder_block"),
    wrong=_wrong,
)

GEMMA3 = KerasHub(
    classes=("Gemma3Backbone",),
    arguments={
        **_ARGUMENTS,
        "use_query_key_norm": True,
        "local_rope_scaling_factor": 1.0,
        "vision_encoder": None,
        "use_bidirectional_attention": False,
        "is_embedding_model": False,
        "pooling_intermediate_dim": None,
        "embedding_dim": None,
        "image_size": None,
        "sliding_window_size": 1024,
        "global_rope_scaling_factor": 1.0,
    },
    fields=lambda x: {
        **_fields(x),
        **_gemma2_fields(x, lambda i: i % 6 < 5),
        "intermediate_dim": x["intermediate_dim"],
        "rope_max_wavelength": 1_000_000.0,
        "local_rope_max_wavelength": 10_000.0,
        "rope_scaling": divided(x["global_rope_scaling_factor"]),
        "max_sequence_length": 131072,
    },
    written=lambda config: {
        **_gemma2_arguments(config),
        "global_rope_scaling_factor": factor(config.rope_scaling),
    },
    weights=_weights("gemma3_decoder_block"),
    wrong=_wrong,
    ignored=["image_size"],
    encoders={"vision_encoder": ["layers/gemma3_vision_encoder"]},
)
