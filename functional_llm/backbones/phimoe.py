"""Phi-3.5-MoE: two experts a token, chosen one after the other; LayerNorm, biases, LongRoPE.

Training draws the experts: `training.draw_experts`. LongRoPE's factor on cosine and sine is a
number of the file, for short texts and for long. References:
[Phi-3](https://arxiv.org/abs/2404.14219), [GRIN](https://arxiv.org/abs/2409.12136).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import llama, mixtral, starcoder2
from functional_llm.backbones.experts import GGUF_KEYS, expert_rows
from functional_llm.backbones.family import Family, check_head_bias, expert_parameters
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.experts import MixingRouter, activated, expert_mlp
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(mixtral.Config):
    """The numbers of a Phi-3.5-MoE, beside those of a Mixtral."""

    attention_bias: bool
    head_bias: bool
    router_noise: float


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layer_type = with_rope(config, config.sliding_window)
    return build_alike(config, build_decoder, layer_norm, layer_type, head_bias=config.head_bias)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    attention = llama.build_attention(config, rotary(), config.attention_bias)
    router = MixingRouter(num_experts=config.num_experts, noise=config.router_noise)
    gate = activated(config.activation)
    mlp = expert_mlp(router, config.intermediate_dim, config.hidden_dim, gate)
    return pre_norm(name, partial(layer_norm, config.layer_norm_epsilon), attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 8, "num_local_experts": 16, "router_jitter_noise": 0.01}
    own |= {"attention_bias": False, "lm_head_bias": False}
    keys = mixtral.complete_keys(own | keys)
    if keys["num_experts_per_tok"] != 2:
        raise ValueError(
            "config.json: expected num_experts_per_tok to be 2, as many as such a router chooses "
            f"whatever it says. Received: {keys['num_experts_per_tok']}."
        )
    check_head_bias(keys, "lm_head_bias")
    return keys


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say: the one factor that llama.cpp has is both."""
    own: JSON = {"lm_head_bias": True}  # llama.cpp reads no model without one
    factor = keys.get("rope_scaling", {}).get("attention_factor")
    both = {"short_mscale": factor, "long_mscale": factor}
    return own | ({"rope_scaling": both} if factor else {})


FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    models="Phi-3.5-MoE",
    config_class=Config,
    build=build,
    config_keys={
        **mixtral.FAMILY.config_keys,
        "attention_bias": "attention_bias",
        "lm_head_bias": "head_bias",
        "router_jitter_noise": "router_noise",
        "input_jitter_noise": object,  # of training
        "original_max_position_embeddings": int,  # which RoPE's own parameters say again
    },
    config_aliases=mixtral.FAMILY.config_aliases,
    complete_keys=complete_keys,
    rope_types={"default": "default", "longrope": "longrope_two_magnitudes"},
    weights=[
        *starcoder2.AROUND,
        *starcoder2.ATTENTION,
        ("lm_head.bias", "head/bias", "same"),
        *expert_rows("model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
    ],
    parameters=expert_parameters(router="mlp.router"),
    ignored=llama.FAMILY.ignored,
    gguf_architecture="phimoe",
    gguf_keys={"expert_count": "num_local_experts", **GGUF_KEYS},
    gguf_defaults=gguf_defaults,
)
