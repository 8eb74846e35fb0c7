"""Falcon-H1: attention and Mamba-2 side by side in each layer, and a multiplier wherever one fits.

Reference: [Falcon-H1](https://arxiv.org/abs/2507.22448).
"""

from dataclasses import dataclass

import keras
import numpy as np

from functional_llm.backbones import falcon_h1_keys, family, state_spaces
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.stacks import build_of_types, with_rope
from functional_llm.backbones.state_spaces import HybridConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import Sum, decoder
from functional_llm.blocks.language_model import Graph, scale
from functional_llm.blocks.mamba2 import Gate, gate_alone, gated_norm, norm_before_gate
from functional_llm.blocks.mlp import ACTIVATIONS, gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig, HybridConfig):
    """The numbers of a Falcon-H1, beside those of `DecoderConfig` and of Mamba-2 layers.

    Multipliers of MLPs are of the gate and of the result; those of states, of the gate, the inputs,
    the ways into the state and out of it, and the steps.
    """

    attention_bias: bool
    mlp_bias: bool
    output_bias: bool
    has_norm: bool
    norm_first: bool
    embedding_multiplier: float
    lm_head_multiplier: float
    key_multiplier: float
    attention_in_multiplier: float
    attention_out_multiplier: float
    ssm_in_multiplier: float
    ssm_out_multiplier: float
    mlp_multipliers: tuple[float, ...]
    ssm_multipliers: tuple[float, ...]


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    types = state_spaces.hybrid_types(config, with_rope(config))
    return build_of_types(
        config,
        [(tuple(types), build_decoder(config, i)) for i in range(config.num_layers)],
        types,
        embedding_parts=[scale(config.embedding_multiplier)],
        logit_parts=[scale(config.lm_head_multiplier)],
    )


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    epsilon, (of_gate, of_result) = config.layer_norm_epsilon, config.mlp_multipliers
    act = ACTIVATIONS[config.activation]
    mlp = gated_mlp(
        config.intermediate_dim, config.hidden_dim, lambda x: act(x * of_gate), config.mlp_bias
    )
    states = [
        scale(config.ssm_in_multiplier),
        build_states(config),
        scale(config.ssm_out_multiplier),
    ]
    attends = [
        scale(config.attention_in_multiplier),
        build_attention(config),
        scale(config.attention_out_multiplier),
    ]
    return decoder(
        f"decoder_{index}",
        [
            [rms_norm(epsilon, "mixer_norm"), Sum([states, attends])],
            [rms_norm(epsilon, "mlp_norm"), mlp, scale(of_result)],
        ],
    )


def build_attention(config: Config) -> CompositeLayer:
    """Returns self-attention."""
    keys, size, bias = config.num_key_value_heads, config.head_dim, config.attention_bias
    return attention(
        query=[heads(config.num_query_heads, size, "query", bias), rotary()],
        key=[heads(keys, size, "key", bias), scale(config.key_multiplier), rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )


def build_states(config: Config) -> CompositeLayer:
    """Returns Mamba-2."""
    sizes, groups = config.state_sizes, config.num_state_groups
    ways = groups * config.state_dim
    widths = (sizes.inner_dim, sizes.inner_dim, ways, ways, sizes.num_heads)
    factors = np.repeat(np.asarray(config.ssm_multipliers), widths).tolist()
    gate: Gate = gate_alone
    if config.has_norm:
        gate = (norm_before_gate if config.norm_first else gated_norm)(
            config.layer_norm_epsilon, groups
        )
    return state_spaces.build_states(
        config,
        config.state_bias,
        gate=gate,
        activation=config.activation,
        output_bias=config.output_bias,
        projected=[lambda x, inputs: x * keras.ops.convert_to_tensor(factors, x.dtype)],
    )


_LAYER = "model.layers.{}"
WEIGHTS: Rows = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    (f"{_LAYER}.input_layernorm.weight", "decoder_{}/mixer_norm/scale", "same"),
    *state_spaces.mixer_rows(f"{_LAYER}.mamba"),
    *family.attention_rows(f"{_LAYER}.self_attn"),
    (f"{_LAYER}.pre_ff_layernorm.weight", "decoder_{}/mlp_norm/scale", "same"),
    *family.all_dense_rows(f"{_LAYER}.feed_forward", "decoder_{}/mlp", family.GATED_MLP),
    ("model.final_layernorm.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    models="Falcon-H1 0.5B–34B",
    config_class=Config,
    build=build,
    config_keys=falcon_h1_keys.CONFIG_KEYS,
    config_constants={"mamba_use_mlp": True},
    config_nulls=[
        *state_spaces.PREFIXED_NULLS,
        *("mamba_d_ssm", "mamba_norm_before_gate"),
        *falcon_h1_keys.SINGLE,
    ],
    complete_keys=falcon_h1_keys.complete_keys,
    written_keys=lambda config: {
        "mamba_d_ssm": config.state_sizes.inner_dim,
        **state_spaces.written_prefixed(config),
    },
    weights=WEIGHTS,
    ignored=(*family.ROPE_BUFFERS, "*.mup_vector"),
    gguf_architecture="falcon-h1",
    gguf_keys={
        **{key: x for key, x in state_spaces.PREFIXED_GGUF_KEYS.items() if key != "ssm.expand"},
        "ssm.inner_size": "mamba_d_ssm",
    },
    gguf_defaults=lambda keys: {"mamba_norm_before_gate": False},
    gguf_rows=state_spaces.gguf_mixer_rows(f"{_LAYER}.mamba"),
)
