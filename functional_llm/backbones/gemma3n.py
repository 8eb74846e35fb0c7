"""Gemma 3n: several streams of hidden states, of which each layer computes one.

The last layers borrow keys and values, and each layer has an embedding of each token. Gates of the
first MLPs are sparse. References: [Gemma 3n](https://ai.google.dev/gemma/docs/gemma-3n), and its
code in Transformers.
"""

from dataclasses import dataclass

from functional_llm.backbones import gemma3n_keys, gemma3n_weights
from functional_llm.backbones.family import Family
from functional_llm.backbones.keras_hub.gemma3n import GEMMA3N
from functional_llm.backbones.sharing import (
    SharingConfig,
    build_sharing,
    self_attention,
)
from functional_llm.backbones.wrapper import llava
from functional_llm.blocks.altup import Streams, altup_decoder, sparse
from functional_llm.blocks.attention import Inputs
from functional_llm.blocks.language_model import Graph, OwnInputs, scale
from functional_llm.blocks.mlp import ACTIVATIONS, gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.per_layer import per_layer_branch, per_layer_embeddings
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor


@dataclass(frozen=True, kw_only=True)
class Config(SharingConfig):
    """The numbers of a Gemma 3n. MLPs have widths of their own; that of all is the first one's."""

    mlp_widths: tuple[int, ...]
    sparse_shares: tuple[float, ...]
    streams: int
    active_stream: int
    scales_stream: bool
    laurel_rank: int

    @property
    def all_streams(self) -> Streams:
        """Returns the streams."""
        return Streams(
            count=self.streams,
            active=self.active_stream,
            hidden_dim=self.hidden_dim,
            epsilon=self.layer_norm_epsilon,
        )


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    streams, head = config.all_streams, (config.num_key_value_heads, config.head_dim)
    return build_sharing(
        config,
        [build_decoder(config, i) for i in range(config.num_layers)],
        dict.fromkeys(FAMILY.layer_types, head),
        embedding_parts=[scale(config.hidden_dim**0.5), streams.begin()],
        own_inputs=per_layer_of_first_stream(config),
        final_norm=streams.end(rms_norm(config.layer_norm_epsilon, "final_norm")),
    )


def per_layer_of_first_stream(config: Config) -> OwnInputs:
    """Returns the embeddings for each layer, which are made of the tokens' own embedding."""
    sizes = (config.per_layer_vocabulary, config.num_layers, config.per_layer_width)
    make = per_layer_embeddings(*sizes, config.hidden_dim, config.layer_norm_epsilon)

    def of_first(x_BTAD: Tensor, inputs: Inputs) -> list[Inputs]:
        return [*make(x_BTAD[:, :, 0], inputs)]

    return of_first


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    width, act, share = config.hidden_dim, config.activation, config.sparse_shares[index]

    def sparse_act(x: Tensor) -> Tensor:
        return ACTIVATIONS[act](sparse(share)(x))

    return altup_decoder(
        f"decoder_{index}",
        config.all_streams,
        self_attention(config, index, (config.num_key_value_heads, config.head_dim)),
        gated_mlp(config.mlp_widths[index], width, sparse_act if share > 0 else act),
        per_layer_branch(config.per_layer_width, width, act),
        rank=config.laurel_rank,
        scales=config.scales_stream,
    )


FAMILY = Family(
    model_type="gemma3n_text",
    architecture="Gemma3nForCausalLM",
    models="Gemma 3n E2B, E4B, text",
    config_class=Config,
    build=build,
    config_keys=gemma3n_keys.CONFIG_KEYS,
    config_constants={"attention_bias": False},
    complete_keys=gemma3n_keys.complete_keys,
    written_keys=lambda config: {"intermediate_size": list(config.mlp_widths)},
    weights=gemma3n_weights.weights,
    ignored=gemma3n_weights.ignored,
    wrappers=[
        llava(
            "gemma3n",
            "gemma3n_text",
            parts=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
        )
    ],
    keras_hub=GEMMA3N,
    gguf_architecture="gemma3n",
    gguf_keys=gemma3n_keys.GGUF_KEYS,
    gguf_given=gemma3n_keys.gguf_given,
    gguf_defaults=gemma3n_keys.gguf_defaults,
    gguf_rows=gemma3n_weights.gguf_rows,
)
