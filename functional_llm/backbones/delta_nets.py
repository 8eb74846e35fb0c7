"""What families share whose layers are gated delta nets, but for every fourth, which attends.

What these attend to is multiplied by a gate of each channel; queries and keys of each head have a
norm, and a quarter of a head turns. The scales of norms are offsets from one, but for those inside
the delta nets. Reference: [Gated Delta Networks](https://arxiv.org/abs/2412.06464).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones import llama, qwen3
from functional_llm.backbones.family import (
    COMMON_KEYS,
    PartialRotaryConfig,
    complete_common_keys,
    dense_rows,
)
from functional_llm.backbones.stacks import build_of_types, with_rope
from functional_llm.backbones.transforms import Rows, fused
from functional_llm.blocks.attention import Part, attention, gate, heads, key_value_shapes
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.delta_net import DeltaNet, delta_net_shapes, gated_delta_net
from functional_llm.blocks.language_model import Graph, StateType
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(PartialRotaryConfig):
    """The numbers of a model with gated delta nets, beside those of `PartialRotaryConfig`."""

    layer_types: tuple[str, ...]
    attention_bias: bool
    convolution_width: int
    num_delta_key_heads: int
    num_delta_value_heads: int
    delta_key_dim: int
    delta_value_dim: int

    @property
    def delta_net(self) -> DeltaNet:
        """The sizes of the delta nets."""
        return DeltaNet(
            key_heads=self.num_delta_key_heads,
            value_heads=self.num_delta_value_heads,
            key_dim=self.delta_key_dim,
            value_dim=self.delta_value_dim,
            width=self.convolution_width,
        )


def build(config: DeltaConfig, mlp: Callable[[int], NamedPart]) -> Graph:
    """Returns the inputs and outputs of the graph; `mlp` makes that of the layer of a number."""
    norm = partial(offset_rms_norm, config.layer_norm_epsilon)
    layers = [
        (kind, pre_norm(f"decoder_{i}", norm, _mixer(config, kind), mlp(i)))
        for i, kind in enumerate(config.layer_types)
    ]
    kept = key_value_shapes(config.num_key_value_heads, config.head_dim)
    return build_of_types(
        config,
        layers,
        {
            "linear_attention": (StateType(), delta_net_shapes(config.delta_net)),
            "full_attention": (with_rope(config), kept),
        },
        offset_rms_norm,
    )


def _mixer(config: DeltaConfig, kind: str) -> CompositeLayer:
    epsilon, bias = config.layer_norm_epsilon, config.attention_bias
    if kind == "linear_attention":
        return gated_delta_net(config.delta_net, config.hidden_dim, config.activation, epsilon)

    def part(num_heads: int, name: str) -> list[Part]:
        project = heads(num_heads, config.head_dim, name, bias)
        return [project, offset_rms_norm(epsilon, f"{name}_norm"), on_first_channels(rotary())]

    return attention(
        query=part(config.num_query_heads, "query"),
        key=part(config.num_key_value_heads, "key"),
        value=[heads(config.num_key_value_heads, config.head_dim, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
        attended=[gate([heads(config.num_query_heads, config.head_dim, "gate", bias)])],
    )


CONFIG_KEYS: dict[str, str | type] = {
    **COMMON_KEYS,
    "layer_types": "layer_types",
    "full_attention_interval": int,
    "attention_bias": "attention_bias",
    "partial_rotary_factor": "partial_rotary_factor",
    "linear_conv_kernel_dim": "convolution_width",
    "linear_num_key_heads": "num_delta_key_heads",
    "linear_num_value_heads": "num_delta_value_heads",
    "linear_key_head_dim": "delta_key_dim",
    "linear_value_head_dim": "delta_value_dim",
    # Of layers that predict more tokens, which are left out.
    **dict.fromkeys(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"), object),
}
CONFIG_CONSTANTS: JSON = {
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "output_gate_type": "swish",
}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")  # of a text, all positions are one


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    interval = keys.get("full_attention_interval", 4)
    if interval < 1:
        raise ValueError(
            f"config.json: expected full_attention_interval of at least 1, received {interval}."
        )
    kinds = [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(keys["num_hidden_layers"])
    ]
    own: JSON = {"layer_types": kinds, "head_dim": 256, "max_position_embeddings": 32768}
    own |= {"attention_bias": False, "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4}
    own |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    own |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    keys = own | keys
    if keys["linear_num_value_heads"] % keys["linear_num_key_heads"]:
        raise ValueError(
            "config.json: expected linear_num_value_heads to be a multiple of linear_num_key_heads,"
            f" received {keys['linear_num_value_heads']} and {keys['linear_num_key_heads']}."
        )
    if isinstance(rope := keys.get("rope_parameters"), dict):
        keys["rope_parameters"] = {key: x for key, x in rope.items() if key not in _OF_IMAGES}
    return complete_common_keys(keys)


_LAYER = "model.layers.{}"
NET, TARGET = f"{_LAYER}.linear_attn", "decoder_{}/delta_net"
# Of the delta nets, whatever their projections are.
NET_ROWS: Rows = [
    (f"{_LAYER}.input_layernorm.weight", "decoder_{}/delta_net_norm/scale", "same"),
    (f"{NET}.conv1d.weight", f"{TARGET}/convolution/kernel", "depthwise"),
    (f"{NET}.A_log", f"{TARGET}/log_decay/log_rate", "same"),
    (f"{NET}.dt_bias", f"{TARGET}/log_decay/shift", "same"),
    (f"{NET}.norm.weight", f"{TARGET}/norm/scale", "same"),
    *dense_rows(f"{NET}.out_proj", f"{TARGET}/output"),
]


def projection_rows(source: str, names: tuple[str, ...], groups: int = 1) -> Rows:
    """Rows of a Linear in a delta net that is several Dense in one.

    Args:
        source: The Linear.
        names: Of the Dense.
        groups: As for `fused`.
    """
    kernel, _ = fused(groups)
    return [(f"{NET}.{source}.weight", f"{TARGET}/{name}/kernel", kernel) for name in names]


def attention_rows(config: DeltaConfig) -> Rows:
    """Returns the rows of a Llama and its norms, with gates."""
    own = gated_query_rows(config)
    others = (row for row in llama.WEIGHTS if row[0] not in {source for source, *_ in own})
    return [*others, *own, *qwen3.QK_NORMS]


def gated_query_rows(config: DeltaConfig) -> Rows:
    """Returns the rows of a Linear that has the query of each head, and its gate behind it."""
    parts = fused(config.num_query_heads)
    return [
        row
        for name in ("query", "gate")
        for row in dense_rows(
            f"{_LAYER}.self_attn.q_proj", f"decoder_{{}}/attention/{name}", *parts
        )
    ]
