"""OLMoE: a Llama with experts that normalises queries and keys over all heads, before RoPE.

What is clipped, if a config says so, are queries, keys (normalised) and values. References:
[OLMoE](https://arxiv.org/abs/2409.02060).
"""

from dataclasses import dataclass
from functools import partial

from keras import ops

from functional_llm.backbones import llama, olmo2, qwen3
from functional_llm.backbones.experts import (
    GGUF_KEYS,
    ExpertsConfig,
    expert_rows,
    softmax_experts,
)
from functional_llm.backbones.family import Family, check_chosen
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import PartFunction
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(ExpertsConfig):
    """The numbers of an OLMoE; `intermediate_dim` is the width of an expert."""

    attention_bias: bool
    clip: float | None
    normalize_weights: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    clips = [] if config.clip is None else [clipped(config.clip)]
    attention = olmo2.self_attention(config, config.attention_bias, clips)
    mlp = softmax_experts(config, config.intermediate_dim, config.normalize_weights)
    return pre_norm(name, norm, attention, mlp)


def clipped(limit: float) -> PartFunction:
    """Part that clips numbers to those from -limit to the limit."""
    return lambda x, inputs: ops.clip(x, -limit, limit)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
    }
    keys = olmo2.complete_keys(own | keys)
    check_chosen(keys["num_experts_per_tok"], keys["num_experts"], "num_experts")
    return keys


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    models="OLMoE 1B-7B",
    config_class=Config,
    build=build,
    config_keys={
        **olmo2.CONFIG_KEYS,
        "clip_qkv": "clip",
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "norm_topk_prob": "normalize_weights",
    },
    config_aliases={"num_local_experts": "num_experts"},
    complete_keys=complete_keys,
    weights=[*llama.WEIGHTS, *qwen3.QK_NORMS, *expert_rows("model.layers.{}.mlp")],
    ignored=llama.FAMILY.ignored,
    gguf_architecture="olmoe",  # whose files have no clips: llama.cpp does not clip
    gguf_keys={"expert_count": "num_experts", **GGUF_KEYS},
)
