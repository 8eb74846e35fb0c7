"""KerasHub's columns of GPT-2 and its kin: LayerNorm, biases, a plain MLP."""

from dataclasses import replace
from typing import Any

import numpy as np

from functional_llm.backbones.keras_hub.column import (
    EMBEDDING,
    OURS,
    REQUIRED,
    SIZES,
    KerasHub,
    attention,
    dense,
    layer_norm,
    one,
)
from functional_llm.backbones.transforms import TRANSFORMS, Rows, Transform, split_axis
from functional_llm.graph.types import JSON

_ARGUMENTS = dict.fromkeys([*SIZES, "num_heads"], REQUIRED)


def _layers(config: Any) -> Rows:
    """Returns the weights but for those of the embeddings."""
    block, count = "layers/transformer_decoder_{}", config.num_heads
    attend = f"{block}/_self_attention_layer/%s_dense"
    return [
        *layer_norm(f"{block}/_self_attention_layer_norm", f"{OURS}/attention_norm"),
        *attention(attend, count, count, config.head_dim),
        *layer_norm(f"{block}/_feedforward_layer_norm", f"{OURS}/mlp_norm"),
        *dense(f"{block}/_feedforward_intermediate_dense", f"{OURS}/mlp/up"),
        *dense(f"{block}/_feedforward_output_dense", f"{OURS}/mlp/down"),
        *layer_norm("layers/layer_normalization", "final_norm"),
    ]


GPT2 = KerasHub(
    classes=("GPT2Backbone",),
    arguments={**_ARGUMENTS, "max_sequence_length": 1024},
    fields=lambda _: {
        "activation": "gelu_approximate",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    weights=lambda config: [
        EMBEDDING,
        one("layers/position_embedding", "position_embedding/embeddings"),
        *_layers(config),
    ],
)

# KerasHub leaves out the rows of the positions that no token has.
_POSITIONS = Transform(lambda x: np.pad(x, ((2, 0), (0, 0))), lambda x: x[2:])
_EMBEDDINGS = "layers/token_and_position_embedding"

OPT = KerasHub(
    classes=("OPTBackbone",),
    arguments={**_ARGUMENTS, "max_sequence_length": 2048},
    fields=lambda x: {
        "activation": "relu",
        "embedding_dim": x["hidden_dim"],
        "tie_word_embeddings": True,
        **dict.fromkeys(["use_bias", "norms_have_weights", "norm_before"], True),
    },
    weights=lambda config: [
        one(f"{_EMBEDDINGS}/token_embedding", "token_embedding/embeddings"),
        (f"{_EMBEDDINGS}/position_embedding/vars/0", "position_embedding/embeddings", _POSITIONS),
        *_layers(config),
    ],
)


def _bloom_weights(config: Any) -> Rows:
    block, count = "layers/bloom_decoder_{}", config.num_heads
    attend = f"{block}/_self_attention_layer/_%s_dense"
    return [
        EMBEDDING,
        *layer_norm("layers/layer_normalization", "embedding_norm"),
        *layer_norm(f"{block}/_pre_attention_layernorm", f"{OURS}/attention_norm"),
        *attention(attend, count, count, config.head_dim, TRANSFORMS["same"]),
        *layer_norm(f"{block}/_post_attention_layernorm", f"{OURS}/mlp_norm"),
        *dense(f"{block}/_mlp_intermediate_dense", f"{OURS}/mlp/up"),
        *dense(f"{block}/_mlp_output_dense", f"{OURS}/mlp/down"),
        *layer_norm("layers/layer_normalization_1", "final_norm"),
    ]


BLOOM = KerasHub(
    classes=("BloomBackbone",),
    arguments={**_ARGUMENTS, "layer_norm_epsilon": 1e-5},
    fields=lambda x: {
        "activation": "gelu_approximate",
        "intermediate_dim": 4 * x["hidden_dim"],  # no config.json can say another
        "max_sequence_length": 2048,
        "tie_word_embeddings": True,
    },
    weights=_bloom_weights,
)


def _heads(count: int, arguments: JSON) -> JSON:
    """Returns the fields of heads that all have keys of their own, and the head that is tied."""
    return {
        "num_key_value_heads": count,
        "head_dim": arguments["hidden_dim"] // count,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    }


_DROPOUTS = ("attention_dropout_rate", "feedforward_dropout_rate")


def _falcon_wrong(config: Any) -> list[str]:
    other = config.layer_norm_epsilon != 1e-5
    return ["the norms of its decoder layers have an epsilon of 1e-5"] if other else []


def _falcon_weights(config: Any) -> Rows:
    block, count = "layers/falcon_transformer_decoder_{}", config.num_query_heads
    attend = f"{block}/attention_layer/%s_dense"
    return [
        EMBEDDING,
        *layer_norm(f"{block}/input_layernorm", f"{OURS}/attention_norm"),
        *attention(attend, count, count, config.head_dim, TRANSFORMS["same"]),
        *layer_norm(f"{block}/post_attention_layernorm", f"{OURS}/mlp_norm"),
        *dense(f"{block}/dense_h_to_4h", f"{OURS}/mlp/up"),
        *dense(f"{block}/dense_4h_to_h", f"{OURS}/mlp/down"),
        *layer_norm("layers/layer_normalization", "final_norm"),
    ]


FALCON = KerasHub(
    classes=("FalconBackbone",),
    arguments={
        **dict.fromkeys([*SIZES, "num_attention_heads"], REQUIRED),
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(_DROPOUTS, 0),
    },
    types={"num_attention_heads": int},
    renamed={"num_attention_heads": "num_query_heads"},
    fields=lambda x: {
        **_heads(x["num_attention_heads"], x),
        "activation": "gelu",
        "max_sequence_length": 2048,
        "num_parallel_norms": 0,
        "rope_max_wavelength": 10000.0,
        "use_alibi": True,
        "use_bias": True,
    },
    wrong=_falcon_wrong,
    always_wrong=["it does not round ALiBi to bfloat16, as Falcon was trained"],
    ignored=_DROPOUTS,
    weights=_falcon_weights,
)


def _gpt_neox_weights(config: Any) -> Rows:
    block, shape = "layers/gpt_neo_x_decoder_{}", (config.num_query_heads, config.head_dim)
    attend = f"{block}/_self_attention_layer"
    kernel, bias = (replace(split_axis(axis, shape), axis=-1) for axis in (1, 0))
    return [
        EMBEDDING,
        *layer_norm(f"{block}/_self_attention_layer_norm", f"{OURS}/attention_norm"),
        *(
            row
            for part in ("query", "key", "value")
            for row in dense(f"{attend}/_qkv_dense", f"{OURS}/attention/{part}", kernel, bias)
        ),
        *dense(f"{attend}/_output_dense", f"{OURS}/attention/output"),
        *layer_norm(f"{block}/_feedforward_layer_norm", f"{OURS}/mlp_norm"),
        *dense(f"{block}/_feedforward_intermediate_dense", f"{OURS}/mlp/up"),
        *dense(f"{block}/_feedforward_output_dense", f"{OURS}/mlp/down"),
        *layer_norm("layers/layer_normalization", "final_norm"),
    ]


GPT_NEOX = KerasHub(
    classes=("GPTNeoXBackbone",),
    arguments={
        **_ARGUMENTS,
        "rotary_percentage": 0.25,
        "rotary_max_wavelength": 10000,
        "layer_norm_epsilon": 1e-5,
        "max_sequence_length": 512,
    },
    renamed={
        "num_heads": "num_query_heads",
        "rotary_percentage": "partial_rotary_factor",
        "rotary_max_wavelength": "rope_max_wavelength",
    },
    types={"num_heads": int, "rotary_percentage": float, "rotary_max_wavelength": float},
    fields=lambda x: {
        **_heads(x["num_heads"], x),
        "activation": "gelu_approximate",
        "attention_bias": True,
        "parallel_residual": True,
    },
    wrong_text=lambda _: ["it turns every new token as the first of the text"],
    weights=_gpt_neox_weights,
)
