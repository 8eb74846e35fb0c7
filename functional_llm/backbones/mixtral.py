"""Mixtral: a Mistral whose MLPs are many, of which a router chooses some a token.

The weights of those chosen are their softmax among all experts, divided by their sum. Reference:
[Mixtral of Experts](https://arxiv.org/abs/2401.04088).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import llama, mistral
from functional_llm.backbones.experts import (
    GGUF_KEYS,
    ExpertsConfig,
    expert_rows,
    softmax_experts,
)
from functional_llm.backbones.family import Family, check_chosen
from functional_llm.backbones.keras_hub import experts
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(mistral.Config, ExpertsConfig):
    """The numbers of a Mixtral; `intermediate_dim` is the width of an expert."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return mistral.build_stack(config, build_decoder)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    mlp = softmax_experts(config, config.intermediate_dim, normalizes=True)
    return pre_norm(name, norm, llama.build_attention(config, rotary(), bias=False), mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    keys = mistral.complete_keys(own | keys)
    check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    return keys


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    models="Mixtral 8x7B, 8x22B",
    config_class=Config,
    build=build,
    config_keys={
        **mistral.FAMILY.config_keys,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
    },
    config_aliases={"num_experts": "num_local_experts"},
    config_constants=mistral.NO_BIASES,
    complete_keys=complete_keys,
    weights=[
        *llama.WEIGHTS,
        *expert_rows("model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
    ],
    ignored=llama.FAMILY.ignored,
    gguf_architecture="llama",
    gguf_told_by="expert_count",
    gguf_keys={"expert_count": "num_local_experts", **GGUF_KEYS},
    gguf_permuted=llama.FAMILY.gguf_permuted,
    keras_hub=experts.MIXTRAL,
)
