"""Nemotron 4, Minitron: LayerNorm scaled by 1 + w, a plain squared-ReLU MLP, half of RoPE.

No Dense has a bias. References: [Nemotron-4](https://arxiv.org/abs/2402.16819),
[Minitron](https://arxiv.org/abs/2407.14679).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama, starcoder2
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
    renamed_keys,
)
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import offset_layer_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a Nemotron, beside those of `PartialRotaryConfig`."""

    attention_bias: bool
    mlp_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_alike(config, build_decoder, offset_layer_norm, with_rope(config))


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, rotate = config.layer_norm_epsilon, on_first_channels(rotary())
    self_attention = llama.build_attention(config, rotate, config.attention_bias)
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation, config.mlp_bias)
    return pre_norm(name, lambda part: offset_layer_norm(epsilon, part), self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"max_position_embeddings": 4096, "norm_eps": 1e-5, "hidden_act": "relu2"}
    own |= {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 0.5}
    # Transformers takes no number of heads for granted here.
    return {**complete_common_keys(own | keys), _HEADS: keys.get(_HEADS)}


_HEADS = "num_key_value_heads"
FAMILY = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    models="Nemotron 4, Nemotron Mini",
    config_class=Config,
    build=build,
    config_keys={
        **renamed_keys(rms_norm_eps="norm_eps"),
        "partial_rotary_factor": "partial_rotary_factor",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    config_aliases={"rope_percent": "partial_rotary_factor"},
    config_ignored={"kv_channels": "head_dim"},
    complete_keys=complete_keys,
    weights=[
        *starcoder2.AROUND,
        *starcoder2.ATTENTION,
        *(row for row in llama.WEIGHTS if ".mlp." in row[0]),
    ],
    ignored=ROPE_BUFFERS,
    gguf_architecture="nemotron",
    gguf_keys={
        "attention.layer_norm_epsilon": "norm_eps",
        "attention.layer_norm_rms_epsilon": "norm_eps",  # which the converter writes, too
    },
    gguf_offset=["*norm.weight"],
)
