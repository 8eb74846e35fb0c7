"""gpt-oss: experts with biases and a clamped activation, sinks, a window in every other layer.

The router takes the experts with the largest logits; their weights are the softmax of these alone.
YaRN does not round the channels between which it ramps. Checkpoints hold the experts in MXFP4, gate
and up by turns. Reference: [gpt-oss](https://arxiv.org/abs/2508.10925).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama
from functional_llm.backbones.family import (
    COMMON_KEYS,
    DecoderConfig,
    Family,
    check_chosen,
    check_windows,
    complete_common_keys,
    dense_rows,
)
from functional_llm.backbones.keras_hub import gpt_oss as keras_hub
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
class Config(DecoderConfig):
    """The numbers of a gpt-oss, beside those of `DecoderConfig`."""

    attention_bias: bool
    layer_types: tuple[str, ...]
    sliding_window: int | None
    num_experts: int
    num_experts_per_token: int
    gate_alpha: float
    gate_limit: float


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return llama.build_stack(config, build_decoder, config.layer_types, config.sliding_window)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    self_attention = llama.build_attention(
        config, rotary(), config.attention_bias, attending_with_sinks()
    )
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        weights=[softmax],
        use_bias=True,
    )
    gate = clamped(config.gate_alpha, config.gate_limit)
    mlp = expert_mlp(router, config.intermediate_dim, config.hidden_dim, gate, use_bias=True)
    epsilon = config.layer_norm_epsilon
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


_THETA, _TRAINED = 150000.0, 4096
# What Transformers takes where a file says nothing of RoPE.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": _TRAINED,
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    kinds = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(keys["num_hidden_layers"])
    ]
    own: JSON = {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": _THETA,
        "attention_bias": True,
        "activation": "silu",
        "layer_types": kinds,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
    if not keys.get("rope_parameters") and not keys.get("rope_scaling"):
        own["rope_parameters"] = {**_ROPE, "rope_theta": keys.get("rope_theta", _THETA)}
    if keys.get("head_dim", 0) is None:  # Transformers divides here
        keys = {**keys, "head_dim": keys["hidden_size"] // keys["num_attention_heads"]}
    keys = own | keys
    check_windows(keys["layer_types"], keys["sliding_window"])
    check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    return complete_common_keys(keys)


def written_keys(config: Config) -> JSON:
    """Returns what tells Transformers that RoPE is not stretched."""
    return {} if config.rope_scaling else {"rope_scaling": {"rope_type": "default"}}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns that YaRN does not round, as the authors have it; llama.cpp rounds."""
    return {"rope_scaling": {"truncate": False}} if "rope_scaling" in keys else {}


_LAYER, _EXPERTS = "model.layers.{}", "model.layers.{}.mlp.experts"
_OF_EXPERTS = "decoder_{}/mlp/experts_"


def weights(config: Config) -> Rows:
    """Returns the weight table."""
    turns = by_turns(config.intermediate_dim)
    return [
        *(row for row in llama.WEIGHTS if ".mlp." not in row[0]),
        (f"{_LAYER}.self_attn.sinks", "decoder_{}/attention/sinks/score", "same"),
        *dense_rows(f"{_LAYER}.mlp.router", "decoder_{}/mlp/router"),
        *((f"{_EXPERTS}.gate_up_proj", f"{_OF_EXPERTS}{x}/kernel", turns) for x in _GATE_UP),
        *((f"{_EXPERTS}.gate_up_proj_bias", f"{_OF_EXPERTS}{x}/bias", turns) for x in _GATE_UP),
        (f"{_EXPERTS}.down_proj", f"{_OF_EXPERTS}down/kernel", "same"),
        (f"{_EXPERTS}.down_proj_bias", f"{_OF_EXPERTS}down/bias", "same"),
    ]


_GATE_UP = ("gate", "up")


def gguf_rows(config: Config) -> Rows:
    """Returns the rows of tensors that llama.cpp's converter takes apart."""
    return [
        (f"{_LAYER}.self_attn.sinks.weight", "decoder_{}/attention/sinks/score", "same"),
        *(
            row
            for part in (*_GATE_UP, "down")
            for row in dense_rows(f"{_EXPERTS}.{part}_proj", f"{_OF_EXPERTS}{part}")
        ),
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
    written_keys=written_keys,
    weights=weights,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="gpt-oss",
    gguf_keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    gguf_ignored=["expert_feed_forward_length"],
    gguf_defaults=gguf_defaults,
    gguf_rows=gguf_rows,
    keras_hub=keras_hub.GPT_OSS,
)
