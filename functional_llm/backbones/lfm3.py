"""LFM3: an LFM2 with wider convolutions, and attention of two kinds, whose heads have gates.

Most layers that attend see a window. Those that see all turn only some of the channels. Norms stand
on both sides of each branch. Reference: [LFM3](https://huggingface.co/LiquidAI/LFM3-1.7B), in
Transformers' code.
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import gemma3, lfm2, lfm2_keys, qwen3
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    check_windows,
    complete_common_keys,
    dense_rows,
)
from functional_llm.blocks.attention import gate_of_each_head
from functional_llm.blocks.decoder import pre_norm, sandwich
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


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
        gates = [gate_of_each_head(config.num_query_heads)] if config.gates_heads else []
        mixer = qwen3.self_attention(config, config.attention_bias, gates)
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    norm = partial(rms_norm, config.layer_norm_epsilon)
    return (sandwich if config.norms_behind else pre_norm)(f"decoder_{index}", norm, mixer, mlp)


_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    kinds = [
        _FULL if i % 4 == 2 else _SLIDING if i % 4 == 0 and i > 0 else "conv"
        for i in range(keys["num_hidden_layers"])
    ]
    own: JSON = {
        "intermediate_size": 7680,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 128_000,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "conv_bias": False,
        "conv_L_cache": 7,
        "layer_types": kinds,
        "sliding_window": 256,
        "use_sandwich_norm": True,
        "use_attention_gate": True,
        "attention_bias": False,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e6,
        "rope_parameters": _ROPE,
        "activation": "silu",
    }
    keys = own | keys
    full = keys["rope_parameters"].get(_FULL) if isinstance(keys["rope_parameters"], dict) else None
    if isinstance(full, dict) and full.get("partial_rotary_factor", 1) != 1:
        if full.get("rope_type", "default") == "default":
            # So files of the first release say, whose own code turns a part of the channels then.
            keys["rope_parameters"] = {
                **keys["rope_parameters"],
                _FULL: {**full, "rope_type": "proportional"},
            }
    check_windows(keys["layer_types"], keys["sliding_window"])
    return complete_common_keys(keys)


def written_keys(config: Config) -> JSON:
    """Returns RoPE as Transformers reads it, of each kind of layers."""
    full: JSON = {"rope_type": "default", "rope_theta": config.rope_max_wavelength}
    if (scaling := config.rope_scaling) is not None:
        of_scaling = {key: x for key, x in vars(scaling).items() if key != "factor" or x != 1}
        full |= {"rope_type": "proportional", **of_scaling}
    local = {"rope_type": "default", "rope_theta": config.local_rope_max_wavelength}
    both = {_FULL: full, _SLIDING: local}
    return {"rope_theta": None, "rope_scaling": None, "rope_parameters": both}


_LAYER = "model.layers.{}"
_ATTENTION = f"{_LAYER}.self_attn"

FAMILY = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    models="LFM3 1.7B",
    config_class=Config,
    build=build,
    config_keys={
        **lfm2_keys.KIN,
        "sliding_window": "sliding_window",
        "attention_bias": "attention_bias",
        "use_attention_gate": "gates_heads",
        "use_sandwich_norm": "norms_behind",
    },
    config_aliases={"rms_norm_eps": "norm_eps"},
    config_constants={"hidden_act": "silu"},
    layer_types=(_FULL, _SLIDING, "conv"),
    complete_keys=complete_keys,
    written_keys=written_keys,
    rope_types={name: name for name in ("default", "proportional")},
    weights=[
        *(row for row in lfm2.WEIGHTS if ".self_attn." not in row[0]),
        *(
            row
            for theirs, ours in zip("qkvog", "query key value output gate".split(), strict=True)
            for row in dense_rows(f"{_ATTENTION}.{theirs}_proj", f"decoder_{{}}/attention/{ours}")
        ),
        *qwen3.QK_NORMS,
        (f"{_LAYER}.post_operator_norm.weight", "decoder_{}/attention_post_norm/scale", "same"),
        (f"{_LAYER}.post_operator_norm.weight", "decoder_{}/convolution_post_norm/scale", "same"),
        (f"{_LAYER}.post_ffn_norm.weight", "decoder_{}/mlp_post_norm/scale", "same"),
    ],
    stored_parts={".self_attn.gate_proj.": ".self_attn.g_proj."},
    ignored=ROPE_BUFFERS,
)
