"""LFM3: an LFM2 with wider convolutions, and attention of two kinds, whose heads have gates.

Most layers that attend see a window. Those that see all turn only some of the channels. Norms stand
on both sides of each branch. Reference: [LFM3](https://huggingface.co/LiquidAI/LFM3-1.7B), in
Transformers' code.
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import gemma3, lfm2, lfm3_keys, qwen3
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    attention_rows,
    dense_rows,
)
from functional_llm.blocks.attention import gate, heads
from functional_llm.blocks.decoder import pre_norm, sandwich
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config(lfm2.Config):
    """The numbers of an LFM3, beside those of an LFM2."""

    local_rope_max_wavelength: float
    sliding_window: int | None
    attention_bias: bool
    gates_heads: bool
    norms_behind: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    types = gemma3.two_ropes(config, config.local_rope_max_wavelength, config.sliding_window)
    layers = [build_decoder(config, i) for i in range(config.num_layers)]
    return lfm2.build_stack(config, layers, types)


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    mixer = lfm2.convolution(config)
    if config.layer_types[index] != "conv":
        gates = [gate([heads(config.num_query_heads, 1, "gate")])] if config.gates_heads else []
        mixer = qwen3.self_attention(config, config.attention_bias, gates)
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    norm = partial(rms_norm, config.layer_norm_epsilon)
    return (sandwich if config.norms_behind else pre_norm)(f"decoder_{index}", norm, mixer, mlp)


_LAYER = "model.layers.{}"
_ATTENTION = f"{_LAYER}.self_attn"

FAMILY = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    models="LFM3 1.7B",
    config_class=Config,
    build=build,
    config_keys=lfm3_keys.CONFIG_KEYS,
    config_aliases={"rms_norm_eps": "norm_eps"},
    config_constants={"hidden_act": "silu"},
    layer_types=(*lfm3_keys.ATTENDING, "conv"),
    complete_keys=lfm3_keys.complete_keys,
    written_keys=lfm3_keys.written_keys,
    rope_types={name: name for name in ("default", "proportional")},
    weights=[
        *(row for row in lfm2.WEIGHTS if ".self_attn." not in row[0]),
        *attention_rows(_ATTENTION),
        *dense_rows(f"{_ATTENTION}.g_proj", "decoder_{}/attention/gate"),
        *qwen3.QK_NORMS,
        (f"{_LAYER}.post_operator_norm.weight", "decoder_{}/attention_post_norm/scale", "same"),
        (f"{_LAYER}.post_operator_norm.weight", "decoder_{}/convolution_post_norm/scale", "same"),
        (f"{_LAYER}.post_ffn_norm.weight", "decoder_{}/mlp_post_norm/scale", "same"),
    ],
    stored_parts={".self_attn.gate_proj.": ".self_attn.g_proj."},
    ignored=ROPE_BUFFERS,
)
