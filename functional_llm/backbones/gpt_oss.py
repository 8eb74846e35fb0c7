"""gpt-oss: experts with biases and a clamped activation, sinks, a window in every other layer.

The router takes the experts with the largest logits; their weights are the softmax of these alone.
YaRN does not round the channels between which it ramps. Checkpoints hold the experts in MXFP4, gate
and up by turns. Reference: [gpt-oss](https://arxiv.org/abs/2508.10925).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import apertus, family, llama, qwen3
from functional_llm.backbones.experts import GGUF_KEYS, ExpertsConfig
from functional_llm.backbones.family import COMMON_KEYS, Family
from functional_llm.backbones.keras_hub import gpt_oss as keras_hub
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.backbones.transforms import Rows, by_turns
from functional_llm.blocks.attention import attending_with_sinks
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.experts import Router, clamped, expert_mlp, softmax
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(ExpertsConfig, qwen3.Config):
    """The numbers of a gpt-oss, beside those of a Qwen 3."""

    gate_alpha: float
    gate_limit: float


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, config.layer_types, config.sliding_window)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    product = attending_with_sinks()
    self_attention = llama.build_attention(config, rotary(), config.attention_bias, product)
    count, chosen = config.num_experts, config.num_experts_per_token
    router = Router(num_experts=count, num_chosen=chosen, weights=[softmax], use_bias=True)
    gate = clamped(config.gate_alpha, config.gate_limit)
    mlp = expert_mlp(router, config.intermediate_dim, config.hidden_dim, gate, use_bias=True)
    return pre_norm(name, partial(rms_norm, config.layer_norm_epsilon), self_attention, mlp)


_THETA = 150000.0
# What Transformers takes where a file says nothing.
_ROPE: JSON = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
_ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_DEFAULTS: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": _THETA}
_DEFAULTS |= {"num_key_value_heads": 8, "head_dim": 64, "attention_bias": True}
_DEFAULTS |= {"sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4}
_DEFAULTS |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "activation": "silu"}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    kinds = ["sliding_attention", "full_attention"] * keys["num_hidden_layers"]
    own: JSON = {"layer_types": kinds[: keys["num_hidden_layers"]], **_DEFAULTS}
    if not keys.get("rope_parameters") and not keys.get("rope_scaling"):
        own["rope_parameters"] = {**_ROPE, "rope_theta": keys.get("rope_theta", _THETA)}
    keys = own | keys
    family.check_windows(keys["layer_types"], keys["sliding_window"])
    family.check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    return family.complete_common_keys(keys)


_LAYER, _SINKS = "model.layers.{}", "decoder_{}/attention/sinks/score"


def parameters(config: Config) -> Rows:
    """Returns the rows of kernels: of experts, and of the router behind them."""
    turns = by_turns(config.intermediate_dim)
    return family.expert_parameters(router="mlp.router", gate_up=turns, down="same")


def weights(config: Config) -> Rows:
    """Returns the weight table."""
    *experts, router = parameters(config)
    return [
        *(row for row in llama.WEIGHTS if ".mlp." not in row[0]),
        (f"{_LAYER}.self_attn.sinks", _SINKS, "same"),
        *experts,
        *((f"{name}_bias", path.replace("kernel", "bias"), x) for name, path, x in experts),
        router,
        (f"{_LAYER}.mlp.router.bias", "decoder_{}/mlp/router/bias", "same"),
    ]


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    models="gpt-oss",
    config_class=Config,
    build=build,
    config_keys={
        **{key: field for key, field in COMMON_KEYS.items() if field != "activation"},
        "attention_bias": "attention_bias",
        "layer_types": "layer_types",
        "sliding_window": "sliding_window",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "swiglu_alpha": "gate_alpha",
        "swiglu_limit": "gate_limit",
        "initial_context_length": int,  # which RoPE's own parameters say again
    },
    config_aliases={"num_experts": "num_local_experts"},
    config_nulls=("num_key_value_heads", "head_dim"),
    config_ignored={"experts_per_token": "num_experts_per_tok"},
    config_constants={"hidden_act": "silu"},
    complete_keys=complete_keys,
    written_keys=apertus.written_keys,
    weights=weights,
    parameters=parameters,
    inputs_first=True,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="gpt-oss",
    gguf_keys={"expert_count": "num_local_experts", **GGUF_KEYS},
    gguf_ignored=["expert_feed_forward_length"],
    # YaRN does not round, as the authors have it; llama.cpp rounds.
    gguf_defaults=lambda keys: (
        {"rope_scaling": {"truncate": False}} if "rope_scaling" in keys else {}
    ),
    gguf_rows=lambda config: [
        (f"{_LAYER}.self_attn.sinks.weight", _SINKS, "same"),
        *family.gguf_expert_rows(),
    ],
    keras_hub=keras_hub.GPT_OSS,
)
