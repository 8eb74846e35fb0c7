"""Gemma 4: layers with a window have smaller heads than the others, and the last ones no keys.

Those look at the keys and values of earlier layers. Values have a norm without a scale; in layers
without a window they may be the keys before their norm. The small models have an embedding of each
token for each layer. Reference: [Gemma 4](https://ai.google.dev/gemma/docs/core/model_card_4), and
its code in Transformers.
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import gemma4_experts, gemma4_gguf
from functional_llm.backbones.family import Family
from functional_llm.backbones.gemma4_keys import (
    CONFIG_KEYS,
    ROPE_TYPES,
    UNIFIED,
    complete_keys,
    written_keys,
)
from functional_llm.backbones.keras_hub import gemma4
from functional_llm.backbones.sharing import (
    SharingConfig,
    build_sharing,
    lenders,
    self_attention,
    unused_tensors,
)
from functional_llm.backbones.wrapper import llava
from functional_llm.blocks.attention import (
    Part,
)
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.per_layer import LayerScale, per_layer_branch
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config(SharingConfig, gemma4_experts.ExpertsConfig):
    """The numbers of a Gemma 4. Heads of layers without a window have numbers of their own.

    The width of embeddings for each layer is 0 if there are none.
    """

    full_head_dim: int
    num_full_key_value_heads: int
    values_are_keys: bool
    borrowing_is_wide: bool

    def head(self, kind: str) -> tuple[int, int]:
        """Returns the number of key heads of layers of this type, and the size of heads."""
        if kind == "full_attention":
            return self.num_full_key_value_heads, self.full_head_dim
        return self.num_key_value_heads, self.head_dim


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [build_decoder(config, i) for i in range(config.num_layers)]
    return build_sharing(config, layers, {kind: config.head(kind) for kind in FAMILY.layer_types})


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    borrows = index in lenders(config.layer_types, config.borrowing_layers)
    width = config.intermediate_dim * (2 if borrows and config.borrowing_is_wide else 1)
    mlp = partial(gated_mlp, width, config.hidden_dim, config.activation)
    kind = config.layer_types[index]
    both = config.values_are_keys and kind == "full_attention"
    branches: list[list[Part]] = [
        [
            norm("attention_norm"),
            self_attention(config, index, config.head(kind), both),
            norm("attention_post_norm"),
        ],
        [norm("mlp_norm"), mlp(), norm("mlp_post_norm")],
    ]
    if config.num_experts is not None:
        branches[1] = [gemma4_experts.experts(config, mlp(name="shared")), norm("mlp_post_norm")]
    if width := config.per_layer_width:
        own = per_layer_branch(width, config.hidden_dim, config.activation)
        branches.append([own, norm("per_layer_post_norm")])
    return decoder(f"decoder_{index}", branches, behind=[LayerScale(name="layer_scale")])


_OTHERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder")
FAMILY = Family(
    model_type="gemma4_text",
    other_model_types=[UNIFIED],
    architecture="Gemma4ForCausalLM",
    models="Gemma 4 E2B, E4B, 12B, 31B, 26B-A4B, text",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    config_constants={"attention_bias": False},
    complete_keys=complete_keys,
    written_keys=written_keys,
    rope_types=ROPE_TYPES,
    weights=gemma4_experts.weights,
    parameters=gemma4_experts.PARAMETERS,
    ignored=lambda config: unused_tensors(config.layer_types, config.borrowing_layers),
    wrappers=[
        llava("gemma4", "gemma4_text", parts=_OTHERS),
        llava("gemma4_unified", UNIFIED, parts=_OTHERS),
    ],
    gguf_architecture="gemma4",
    gguf_given=gemma4_gguf.given,
    gguf_keys=gemma4_gguf.KEYS,
    gguf_defaults=gemma4_gguf.defaults,
    gguf_rows=gemma4_gguf.rows,
    keras_hub=gemma4.GEMMA4,
)
