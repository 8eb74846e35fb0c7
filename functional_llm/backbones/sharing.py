"""What Gemma 3n and Gemma 4 have: layers that borrow keys and values, embeddings for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from functional_llm.backbones.family import ROPE_BUFFERS, DecoderConfig, renamed_keys
from functional_llm.backbones.stacks import build_around
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import (
    Part,
    attention,
    borrowing_attention,
    heads,
    key_value_shapes,
)
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.language_model import Graph, LayerType, scale, soft_cap
from functional_llm.blocks.norm import bare_rms_norm, rms_norm
from functional_llm.blocks.per_layer import per_layer_embeddings
from functional_llm.blocks.rope import Rope, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class SharingConfig(DecoderConfig):
    """The numbers of a model whose last layers borrow keys and values, beside `DecoderConfig`'s."""

    local_rope_max_wavelength: float
    final_logit_soft_cap: float | None
    layer_types: tuple[str, ...]
    sliding_window: int
    borrowing_layers: int
    per_layer_width: int
    per_layer_vocabulary: int


def self_attention(
    config: SharingConfig, index: int, key_heads: tuple[int, int], values_are_keys: bool = False
) -> NamedPart:
    """Returns the attention of the layer of this number: scores without a scale, values normed.

    Args:
        config: The numbers of the model.
        index: Of the layer.
        key_heads: How many heads have keys, and their size.
        values_are_keys: Whether values are the keys before their norm.
    """
    norm, size = partial(rms_norm, config.layer_norm_epsilon), key_heads[1]
    lending = lenders(config.layer_types, config.borrowing_layers)
    query: list[Part] = [heads(config.num_query_heads, size, "query"), norm("query_norm"), rotary()]
    output = keras.layers.Dense(config.hidden_dim, use_bias=False, name="output")
    product = AttentionDotProduct(1.0, name="dot_product")
    if index in lending:
        return borrowing_attention(query, output, product)
    keys = heads(*key_heads, "key")
    values = [] if values_are_keys else [heads(*key_heads, "value")]
    return attention(
        query,
        key=[*([] if values_are_keys else [keys]), norm("key_norm"), rotary()],
        value=[*values, bare_rms_norm(config.layer_norm_epsilon)],
        output=output,
        product=product,
        key_and_value=[keys] if values_are_keys else [],
        lends=index in lending.values(),
    )


def build_sharing(
    config: SharingConfig,
    layers: Sequence[CompositeLayer],
    heads_of: Mapping[str, tuple[int, int]],
    **others: Any,
) -> Graph:
    """Returns the graph of such layers.

    Args:
        config: The numbers of the model.
        layers: In order.
        heads_of: Type of layers -> how many heads have keys, and their size.
        **others: As for `build_around`.
    """
    full = Rope(heads_of["full_attention"][1], config.rope_max_wavelength, config.rope_scaling)
    sliding = Rope(heads_of["sliding_attention"][1], config.local_rope_max_wavelength)
    types = {
        "full_attention": LayerType(full),
        "sliding_attention": LayerType(sliding, config.sliding_window),
    }
    kinds, width = config.layer_types, config.hidden_dim
    lending = lenders(kinds, config.borrowing_layers)
    own, cap = None, config.final_logit_soft_cap
    if config.per_layer_width:
        sizes = (config.per_layer_vocabulary, config.num_layers, config.per_layer_width, width)
        own = per_layer_embeddings(*sizes, config.layer_norm_epsilon)
    parts: dict[str, Any] = {
        "embedding_parts": [scale(width**0.5)],
        "logit_parts": [] if cap is None else [soft_cap(cap)],
        "own_inputs": own,
    }
    return build_around(
        config,
        [*zip(kinds, layers, strict=True)],
        types,
        keeps=[
            {} if i in lending else key_value_shapes(*heads_of[kind])
            for i, kind in enumerate(kinds)
        ],
        lenders={layers[i].name: layers[j].name for i, j in lending.items()},
        **(parts | others),
    )


def lenders(kinds: Sequence[str], borrowing: int) -> dict[int, int]:
    """Returns the number of each layer that borrows -> that of the layer that lends to it.

    Args:
        kinds: The type of each layer.
        borrowing: How many of the last layers borrow: from the last other layer of their type.
    """
    first = len(kinds) - borrowing
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    return {i: last[kinds[i]] for i in range(first, len(kinds))}


CONFIG_KEYS: dict[str, str | type] = {
    **renamed_keys(hidden_act="hidden_activation"),
    "final_logit_softcapping": "final_logit_soft_cap",
    "layer_types": "layer_types",
    "sliding_window": "sliding_window",
    "num_kv_shared_layers": "borrowing_layers",
    "hidden_size_per_layer_input": "per_layer_width",
    "vocab_size_per_layer_input": "per_layer_vocabulary",
}
GGUF_KEYS = {
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
}
# Of both in Transformers.
DEFAULTS: JSON = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "rope_local_base_freq": 10_000.0,
}


def check_sharing(keys: JSON) -> None:
    """Checks that each type of layers has one that lends, as Transformers does.

    Raises:
        ValueError: If one has none.
    """
    kinds, borrowing = keys["layer_types"], keys["num_kv_shared_layers"]
    first = len(kinds) - borrowing
    if borrowing and (borrowing < 0 or set(kinds[: max(0, first)]) != set(kinds)):
        raise ValueError(
            "config.json: expected a num_kv_shared_layers that leaves, before the layers that use "
            f"the keys and values of others, one of each type in layer_types. Received: {borrowing}"
            f" of {len(kinds)} layers, {', '.join(sorted(set(kinds)))}."
        )


def unused_tensors(kinds: Sequence[str], borrowing: int) -> list[str]:
    """Returns patterns of what checkpoints hold in vain: keys of layers that borrow, buffers."""
    borrowers = lenders(kinds, borrowing)
    return [
        *ROPE_BUFFERS,
        *(
            f"model.layers.{i}.self_attn.{part}.weight"
            for i in borrowers
            for part in ("k_proj", "v_proj", "k_norm", "v_norm")
        ),
        # GGUF's names of the same.
        *(f"blk.{i}.attn_{part}.weight" for i in borrowers for part in ("k", "v", "k_norm")),
    ]


_LAYER, _OWN = "model.layers.{}", "decoder_{}/per_layer"
PER_LAYER_ROWS: Rows = [
    ("model.embed_tokens_per_layer.weight", "per_layer_embedding/embeddings", "same"),
    ("model.per_layer_model_projection.weight", "per_layer_projection/kernel", "transpose"),
    ("model.per_layer_projection_norm.weight", "per_layer_norm/scale", "same"),
    (f"{_LAYER}.per_layer_input_gate.weight", f"{_OWN}/gate/kernel", "transpose"),
    (f"{_LAYER}.per_layer_projection.weight", f"{_OWN}/projection/kernel", "transpose"),
    (f"{_LAYER}.post_per_layer_input_norm.weight", f"{_OWN}_post_norm/scale", "same"),
]
