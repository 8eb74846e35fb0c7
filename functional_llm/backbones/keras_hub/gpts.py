"""KerasHub's columns of GPT-2 and its kin: LayerNorm, biases, a plain MLP."""

from typing import Any

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
from functional_llm.backbones.transforms import Rows

_ARGUMENTS = dict.fromkeys([*SIZES, "num_heads"], REQUIRED)


def _weights(config: Any) -> Rows:
    block, count = "layers/transformer_decoder_{}", config.num_heads
    attend = f"{block}/_self_attention_layer/%s_dense"
    return [
        EMBEDDING,
        one("layers/position_embedding", "position_embedding/embeddings"),
        *layer_norm(f"{block}/_self_attention_layer_norm", f"{OURS}/attention_norm"),
        *attention(attend, count, count, config.hidden_dim // count),
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
    written=lambda _: {},
    weights=_weights,
)
