"""Qwen 2 with experts: a Qwen 2 whose MLPs are many, and one beside them that all tokens take.

A router chooses some of the many for each token; the weights are their softmax among all, divided
by their sum where a config says so. What the shared one computes is multiplied by the sigmoid of a
number for each token. Layers that a config names have one MLP. References:
[Qwen1.5-MoE](https://qwenlm.github.io/blog/qwen-moe/), [Qwen2](https://arxiv.org/abs/2407.10671).
"""

from dataclasses import dataclass
from typing import Any

from functional_llm.backbones import llama, qwen2, stacks
from functional_llm.backbones.experts import (
    GGUF_KEYS,
    SPARSE_KEYS,
    SparseConfig,
    complete_sparse_keys,
    expert_rows,
    shared_rows,
    softmax_experts,
)
from functional_llm.backbones.family import Family, check_windows, complete_common_keys
from functional_llm.backbones.keras_hub import experts
from functional_llm.blocks.experts import gated
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(SparseConfig, qwen2.Config):
    """The numbers of a Qwen 2 with experts, beside those of a Qwen 2."""

    attention_bias: bool
    shared_expert_dim: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [(kind, build_decoder(config, i)) for i, kind in enumerate(config.layer_types)]
    return stacks.build_around(config, layers, stacks.one_rope(config, config.sliding_window))


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    name, bias = f"decoder_{index}", config.attention_bias
    if index in config.dense_layers:
        return qwen2.build_decoder(config, name, bias=bias)
    size = config.hidden_dim
    shared = gated(gated_mlp(config.shared_expert_dim, size, config.activation, name="shared"))
    mlp = softmax_experts(config, config.expert_dim, config.normalize_weights, shared)
    return qwen2.build_decoder(config, name, mlp, bias)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    }
    keys = complete_sparse_keys(own | keys)
    slides, first = keys.get("use_sliding_window", False), keys.get("max_window_layers", 28)
    window = max(keys.get("sliding_window", 4096) or 0, 0) if slides else 0  # 0 for none
    kinds = [
        "sliding_attention" if slides and i % 2 == 0 and i < first else "full_attention"
        for i in range(keys["num_hidden_layers"])
    ]
    keys = {"layer_types": kinds} | keys | {"sliding_window": window or None}
    check_windows(keys["layer_types"], keys["sliding_window"])
    return complete_common_keys(keys)


def written_keys(config: Any) -> JSON:
    """Returns what Transformers must be told of the window."""
    return {"sliding_window": config.sliding_window, **qwen2.written_keys(config)}


_SHARED = "model.layers.{}.mlp.shared_expert"
SHARED = [
    (f"{_SHARED}_gate.weight", "decoder_{}/mlp/shared_gate/kernel", "transpose"),
    *shared_rows(_SHARED),
]

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    models="Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
    config_class=Config,
    build=build,
    config_keys={
        **qwen2.CONFIG_KEYS,
        **SPARSE_KEYS,
        "shared_expert_intermediate_size": "shared_expert_dim",
        "qkv_bias": "attention_bias",
        "sliding_window": int,  # 0 for none
    },
    config_constants=qwen2.FAMILY.config_constants,
    config_nulls=["num_experts", "sliding_window"],  # the former makes no model
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=[*llama.WEIGHTS, *expert_rows("model.layers.{}.mlp"), *SHARED],
    ignored=llama.FAMILY.ignored,
    gguf_architecture="qwen2moe",
    gguf_keys={
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        **GGUF_KEYS,
    },
    keras_hub=experts.QWEN2_MOE,
)
