"""Qwen 3 with experts: a Qwen 3 whose MLPs are many, of which a router chooses some a token.

The weights of those chosen are their softmax among all experts, divided by their sum where a config
says so. Layers that a config names have one MLP. Reference:
[Qwen3](https://arxiv.org/abs/2505.09388).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama, qwen3, stacks
from functional_llm.backbones.experts import (
    GGUF_KEYS,
    SPARSE_KEYS,
    SparseConfig,
    complete_sparse_keys,
    expert_rows,
    softmax_experts,
)
from functional_llm.backbones.family import Family, with_divided_heads
from functional_llm.backbones.keras_hub import experts
from functional_llm.blocks.language_model import Graph
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(SparseConfig, qwen3.Config):
    """The numbers of a Qwen 3 with experts, beside those of a Qwen 3."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [(kind, build_decoder(config, i)) for i, kind in enumerate(config.layer_types)]
    return stacks.build_around(config, layers, stacks.one_rope(config, config.sliding_window))


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    if index in config.dense_layers:
        return qwen3.build_decoder(config, f"decoder_{index}")
    mlp = softmax_experts(config, config.expert_dim, config.normalize_weights)
    return qwen3.build_decoder(config, f"decoder_{index}", mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    keys = complete_sparse_keys(own | with_divided_heads(keys))  # unlike a Qwen 3
    window = keys.get("sliding_window", 4096) if keys.get("use_sliding_window") else None
    kind = "full_attention" if window is None else "sliding_attention"  # of all layers
    return qwen3.complete_keys(keys | {"layer_types": [kind] * keys["num_hidden_layers"]})


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    models="Qwen 3 30B-A3B, 235B-A22B, Coder",
    config_class=Config,
    build=build,
    config_keys={
        **{key: x for key, x in qwen3.FAMILY.config_keys.items() if key != "layer_types"},
        **SPARSE_KEYS,
    },
    config_aliases={"num_local_experts": "num_experts"},
    config_constants=qwen3.FAMILY.config_constants,
    config_nulls=["num_experts"],  # of which Transformers makes no model
    complete_keys=complete_keys,
    written_keys=qwen3.FAMILY.written_keys,
    weights=[*llama.WEIGHTS, *qwen3.QK_NORMS, *expert_rows("model.layers.{}.mlp")],
    ignored=qwen3.FAMILY.ignored,
    gguf_architecture="qwen3moe",
    gguf_keys={
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        **GGUF_KEYS,
    },
    gguf_defaults=lambda keys: {"norm_topk_prob": True},
    keras_hub=experts.QWEN3_MOE,
)
