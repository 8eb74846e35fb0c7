"""Gemma 4: layers with a window have smaller heads than the others, and the last ones no keys.

Those look at the keys and values of earlier layers. Values have a norm without a scale; in layers
without a window they may be the keys before their norm. The small models have an embedding of each
token for each layer. Reference: [Gemma 4](https://ai.google.dev/gemma/docs/core/model_card_4), and
its code in Transformers.
"""

from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones import gemma2, qwen3
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.gemma4_keys import (
    CONFIG_KEYS,
    ROPE_TYPES,
    complete_keys,
    written_keys,
)
from functional_llm.backbones.sharing import PER_LAYER_ROWS, borrowed_tensors, lenders
from functional_llm.backbones.stacks import build_around
from functional_llm.backbones.transforms import Rows
from functional_llm.backbones.wrapper import llava
from functional_llm.blocks.attention import (
    Part,
    attention,
    borrowing_attention,
    heads,
    key_value_shapes,
)
from functional_llm.blocks.decoder import NamedPart, decoder
from functional_llm.blocks.language_model import Graph, LayerType, scale, soft_cap
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import bare_rms_norm, rms_norm
from functional_llm.blocks.per_layer import LayerScale, per_layer_branch, per_layer_embeddings
from functional_llm.blocks.rope import Rope, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Gemma 4, beside those of `DecoderConfig`; its heads are those with a window.

    The width of embeddings for each layer is 0 if there are none.
    """

    local_rope_max_wavelength: float
    final_logit_soft_cap: float | None
    layer_types: tuple[str, ...]
    sliding_window: int
    full_head_dim: int
    num_full_key_value_heads: int
    values_are_keys: bool
    borrowing_layers: int
    borrowing_is_wide: bool
    per_layer_width: int
    per_layer_vocabulary: int

    def head(self, kind: str) -> tuple[int, int]:
        """Returns the number of key heads of layers of this type, and the size of heads."""
        if kind == "full_attention":
            return self.num_full_key_value_heads, self.full_head_dim
        return self.num_key_value_heads, self.head_dim


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    kinds, width = config.layer_types, config.hidden_dim
    full = Rope(config.full_head_dim, config.rope_max_wavelength, config.rope_scaling)
    sliding = Rope(config.head_dim, config.local_rope_max_wavelength)
    types = {
        "full_attention": LayerType(full),
        "sliding_attention": LayerType(sliding, config.sliding_window),
    }
    lending = lenders(kinds, config.borrowing_layers)
    cap, own = config.final_logit_soft_cap, None
    if config.per_layer_width:
        own = per_layer_embeddings(
            config.per_layer_vocabulary,
            config.num_layers,
            config.per_layer_width,
            width,
            config.layer_norm_epsilon,
        )
    return build_around(
        config,
        [(kind, build_decoder(config, i)) for i, kind in enumerate(kinds)],
        types,
        keeps=[
            {} if i in lending else key_value_shapes(*config.head(kind))
            for i, kind in enumerate(kinds)
        ],
        embedding_parts=[scale(width**0.5)],
        logit_parts=[] if cap is None else [soft_cap(cap)],
        own_inputs=own,
        lenders={f"decoder_{i}": f"decoder_{j}" for i, j in lending.items()},
    )


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    borrows = index in lenders(config.layer_types, config.borrowing_layers)
    mlp_dim = config.intermediate_dim * (2 if borrows and config.borrowing_is_wide else 1)
    parts: list[NamedPart] = [
        self_attention(config, index),
        gated_mlp(mlp_dim, config.hidden_dim, config.activation),
    ]
    branches: list[list[Part]] = [
        [norm(f"{part.name}_norm"), part, norm(f"{part.name}_post_norm")] for part in parts
    ]
    if width := config.per_layer_width:
        own = per_layer_branch(width, config.hidden_dim, config.activation)
        branches.append([own, norm("per_layer_post_norm")])
    return decoder(f"decoder_{index}", branches, behind=[LayerScale(name="layer_scale")])


def self_attention(config: Config, index: int) -> NamedPart:
    """Returns the attention of the layer of this number."""
    norm, kinds = partial(rms_norm, config.layer_norm_epsilon), config.layer_types
    num_heads, size = config.head(kinds[index])
    lending = lenders(kinds, config.borrowing_layers)
    query: list[Part] = [heads(config.num_query_heads, size, "query"), norm("query_norm"), rotary()]
    output = keras.layers.Dense(config.hidden_dim, use_bias=False, name="output")
    product = AttentionDotProduct(1.0, name="dot_product")
    if index in lending:
        return borrowing_attention(query, output, product)
    keys: list[Part] = [heads(num_heads, size, "key")]
    values: list[Part] = [heads(num_heads, size, "value")]
    both: list[Part] = []
    if config.values_are_keys and kinds[index] == "full_attention":
        both, keys, values = keys, [], []
    return attention(
        query,
        key=[*keys, norm("key_norm"), rotary()],
        value=[*values, bare_rms_norm(config.layer_norm_epsilon)],
        output=output,
        product=product,
        key_and_value=both,
        lends=index in lending.values(),
    )


_LAYER = "model.layers.{}"
WEIGHTS: Rows = [
    *gemma2.WEIGHTS,
    *qwen3.QK_NORMS,
    *PER_LAYER_ROWS,
    (f"{_LAYER}.layer_scalar", "decoder_{}/layer_scale/scale", "same"),
]

_OTHERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    models="Gemma 4 E2B, E4B, 31B, text",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    config_constants={"attention_bias": False, "enable_moe_block": False},
    complete_keys=complete_keys,
    written_keys=written_keys,
    rope_types=ROPE_TYPES,
    weights=WEIGHTS,
    ignored=lambda config: borrowed_tensors(config.layer_types, config.borrowing_layers),
    wrappers=[llava("gemma4", "gemma4_text", parts=_OTHERS)],
    gguf_architecture="gemma4",
)
