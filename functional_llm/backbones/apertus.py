"""Apertus: a Llama with the attention of a Qwen 3 and a plain MLP, whose xIELU is learned.

RoPE is stretched as in Llama 3.1. GGUF files hold the numbers of xIELU as metadata. Reference:
[Apertus](https://arxiv.org/abs/2509.14233).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama, qwen3
from functional_llm.backbones.family import (
    COMMON_KEYS,
    PLAIN_MLP,
    DecoderConfig,
    Family,
    all_dense_rows,
    complete_common_keys,
)
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.backbones.transforms import axis_added
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import XIELU, mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an Apertus, beside those of `DecoderConfig`."""

    attention_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    self_attention = qwen3.self_attention(config, config.attention_bias)
    plain = mlp(config.intermediate_dim, config.hidden_dim, XIELU(name="xielu"), use_bias=False)
    epsilon = config.layer_norm_epsilon
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, plain)


# What Transformers takes where a file says nothing of RoPE.
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12_000_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "rope_theta": 12_000_000.0}
    own |= {"attention_bias": False, "activation": "xielu"}
    if not keys.get("rope_parameters") and not keys.get("rope_scaling"):
        own["rope_parameters"] = _ROPE
    return complete_common_keys(own | keys)


def written_keys(config: Config) -> JSON:
    """Returns what tells Transformers that RoPE is not stretched."""
    return {} if config.rope_scaling else {"rope_scaling": {"rope_type": "default"}}


_LAYER = "model.layers.{}"
_XIELU = f"{_LAYER}.mlp.act_fn"
_PARTS = ("alpha_p", "alpha_n", "beta", "eps")
FAMILY = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    models="Apertus",
    config_class=Config,
    build=build,
    config_keys={
        **{key: field for key, field in COMMON_KEYS.items() if field != "activation"},
        "attention_bias": "attention_bias",
    },
    config_constants={"hidden_act": "xielu", "qk_norm": True, "post_norm": False}
    | {"mlp_bias": False},
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=[
        *(row for row in llama.WEIGHTS if "layernorm" not in row[0] and ".mlp." not in row[0]),
        (f"{_LAYER}.attention_layernorm.weight", "decoder_{}/attention_norm/scale", "same"),
        (f"{_LAYER}.feedforward_layernorm.weight", "decoder_{}/mlp_norm/scale", "same"),
        *qwen3.QK_NORMS,
        *all_dense_rows(f"{_LAYER}.mlp", "decoder_{}/mlp", PLAIN_MLP),
        *((f"{_XIELU}.{x}", f"decoder_{{}}/mlp/xielu/{x}", "same") for x in _PARTS[:2]),
        *((f"{_XIELU}.{x}", f"decoder_{{}}/mlp/xielu/{x}", axis_added(0)) for x in _PARTS[2:]),
    ],
    ignored=llama.FAMILY.ignored,
    gguf_architecture="apertus",
    gguf_rows=lambda config: [
        (f"xielu.{x}.{{}}", f"decoder_{{}}/mlp/xielu/{x}", "same") for x in _PARTS
    ],
    gguf_values=[f"xielu.{x}" for x in _PARTS],
)
