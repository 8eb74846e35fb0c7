"""KerasHub's columns for families whose files have no room for them."""

from typing import Any

from functional_llm.backbones.keras_hub import (
    EMBEDDING,
    REQUIRED,
    SIZES,
    KerasHub,
    dense,
    llama_fields,
)
from functional_llm.backbones.transforms import Row, Rows, split_axis
from functional_llm.blocks.rope import Rope
from functional_llm.graph.types import JSON

_OURS = "decoder_{}"


def _scale(place: str, path: str) -> Row:
    return f"{place}/vars/0", f"{path}/scale", "same"


_SMOLLM3 = "layers/smol_lm3_decoder_layer_{}"
_FREQUENCIES = f"{_SMOLLM3}/self_attn/rotary_embedding/vars/0"


def _smollm3_fields(x: JSON) -> JSON:
    turns = [int(turn) for turn in x["rope_layer_enabled_list"]] + [1] * x["num_layers"]
    known = {**x, "num_query_heads": x["num_attention_heads"]}
    return llama_fields(
        known,
        x["max_position_embeddings"],
        num_query_heads=x["num_attention_heads"],
        rope_max_wavelength=x["rope_theta"],
        attention_bias=False,  # with it, KerasHub's output has none
        no_rope_layers=tuple(turns[: x["num_layers"]]),
        layer_types=("full_attention",) * x["num_layers"],
        sliding_window=None,
        tie_word_embeddings=True,
    )


def _smollm3_weights(config: Any) -> Rows:
    queries, size = config.num_query_heads, config.head_dim
    attention = f"{_SMOLLM3}/self_attn"
    output = split_axis(0, (queries, size))
    return [
        (EMBEDDING, "token_embedding/embeddings", "same"),
        _scale(f"{_SMOLLM3}/input_layernorm", f"{_OURS}/attention_norm"),
        *dense(f"{attention}/q_proj", f"{_OURS}/attention/query"),
        *dense(f"{attention}/k_proj", f"{_OURS}/attention/key"),
        *dense(f"{attention}/v_proj", f"{_OURS}/attention/value"),
        *dense(f"{attention}/o_proj", f"{_OURS}/attention/output", output),
        _scale(f"{_SMOLLM3}/post_attention_layernorm", f"{_OURS}/mlp_norm"),
        *dense(f"{_SMOLLM3}/mlp/gate_proj", f"{_OURS}/mlp/gate"),
        *dense(f"{_SMOLLM3}/mlp/up_proj", f"{_OURS}/mlp/up"),
        *dense(f"{_SMOLLM3}/mlp/down_proj", f"{_OURS}/mlp/down"),
        _scale("layers/rms_normalization", "final_norm"),
    ]


SMOLLM3 = KerasHub(
    classes=("SmolLM3Backbone",),
    arguments=dict.fromkeys(
        [
            *SIZES,
            *("num_attention_heads", "num_key_value_heads", "attention_bias", "mlp_bias"),
            *("attention_dropout", "rope_layer_enabled_list", "layer_types", "layer_norm_epsilon"),
            *("max_position_embeddings", "rope_theta", "partial_rotary_factor"),
        ],
        REQUIRED,
    ),
    types={
        "num_attention_heads": int,
        "max_position_embeddings": int,
        "rope_theta": float,
        "rope_layer_enabled_list": tuple[int, ...],
    },
    fields=_smollm3_fields,
    written=lambda x: {
        "num_attention_heads": x.num_query_heads,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [bool(turn) for turn in x.no_rope_layers],
        "layer_types": list(x.layer_types),
        "max_position_embeddings": x.max_sequence_length,
        "rope_theta": x.rope_max_wavelength,
        "partial_rotary_factor": 1.0,
    },
    ignored=("attention_dropout",),
    weights=_smollm3_weights,
    computed=lambda x: {_FREQUENCIES: Rope(x.head_dim, x.rope_max_wavelength).frequencies},
)
