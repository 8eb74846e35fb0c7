"""Kimi Linear: delta nets in which each channel decays by itself, latent attention without RoPE.

Three of four layers are delta nets, the others attend. MLPs are a DeepSeek V3's: the first layers
have one, all others have experts beside one that all tokens take. Reference:
[Kimi Linear](https://arxiv.org/abs/2510.26692).
"""

from dataclasses import dataclass

from functional_llm.backbones import (
    kimi_linear_keys,
    kimi_linear_weights,
    latent,
    llama,
)
from functional_llm.backbones.family import Family
from functional_llm.backbones.kimi_linear_keys import KimiConfig
from functional_llm.backbones.routed_experts import build_decoder, sigmoid_router
from functional_llm.backbones.stacks import build_of_types
from functional_llm.blocks.delta_net import channel_delta_net, delta_net_shapes
from functional_llm.blocks.language_model import Graph, LayerType, StateType
from functional_llm.blocks.latent_attention import latent_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(KimiConfig):
    """The numbers of a Kimi Linear."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [
        (kind, build_decoder(config, i, build_mixer(config, kind), sigmoid_router(config)))
        for i, kind in enumerate(config.layer_types)
    ]
    latents = latent_shapes(config.latent_dim, config.rotary_dim)
    return build_of_types(
        config,
        layers,
        {
            "linear_attention": (StateType(), delta_net_shapes(config.delta_net)),
            "full_attention": (LayerType(), latents),
        },
    )


def build_mixer(config: Config, kind: str) -> CompositeLayer:
    """Returns what mixes tokens in layers of a type."""
    if kind == "full_attention":
        return latent.build_attention(config, rotate=[])
    epsilon, width = config.layer_norm_epsilon, config.hidden_dim
    return channel_delta_net(config.delta_net, width, config.activation, epsilon)


def written_keys(config: Config) -> JSON:
    """Returns what Transformers and others need beside the keys of fields."""
    nets = kimi_linear_keys.written_nets(config)
    return {
        **latent.written_keys(config),
        **kimi_linear_keys.CONSTANTS,
        "linear_attn_config": nets,
    }


FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    models="Kimi Linear 48B-A3B",
    config_class=Config,
    build=build,
    config_keys=kimi_linear_keys.CONFIG_KEYS,
    config_aliases=kimi_linear_keys.ALIASES,
    config_constants=kimi_linear_keys.CONSTANTS,
    config_nulls=kimi_linear_keys.NULLS,
    layer_types=("full_attention", "linear_attention"),
    complete_keys=kimi_linear_keys.complete_keys,
    written_keys=written_keys,
    weights=kimi_linear_weights.weights,
    ignored=llama.ROPE_BUFFERS,
    stored_parts=kimi_linear_weights.STORED_PARTS,
    gguf_architecture="kimi-linear",
    gguf_given=kimi_linear_keys.gguf_given,
    gguf_keys=kimi_linear_keys.GGUF_KEYS,
    gguf_ignored=["expert_gating_func", "rope.freq_base"],
    gguf_defaults=kimi_linear_keys.gguf_defaults,
    gguf_rows=kimi_linear_weights.gguf_rows,
)
