"""Qwen3-Next: gated delta nets, but for every fourth layer, which attends through a gate; experts.

The experts are as in a Qwen 2 with experts: softmax among all, and one that all tokens take.
References: [Qwen3-Next](https://qwen.ai/blog?id=qwen3-next),
[Gated Delta Networks](https://arxiv.org/abs/2412.06464).
"""

from dataclasses import dataclass

from functional_llm.backbones import delta_gguf, delta_nets
from functional_llm.backbones.delta_nets import DeltaConfig, projection_rows
from functional_llm.backbones.experts import (
    GGUF_KEYS,
    SPARSE_KEYS,
    SparseConfig,
    complete_sparse_keys,
    expert_rows,
    softmax_experts,
)
from functional_llm.backbones.family import Family
from functional_llm.backbones.qwen2_moe import SHARED
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.experts import gated
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(SparseConfig, DeltaConfig):
    """The numbers of a Qwen3-Next."""

    shared_expert_dim: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    size, activation = config.hidden_dim, config.activation

    def mlp(index: int) -> NamedPart:
        if index in config.dense_layers:
            return gated_mlp(config.intermediate_dim, size, activation)
        shared = gated(gated_mlp(config.shared_expert_dim, size, activation, name="shared"))
        return softmax_experts(config, config.expert_dim, config.normalize_weights, shared)

    return delta_nets.build(config, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 2, "intermediate_size": 5632, "norm_topk_prob": True}
    own |= {"num_experts": 512, "num_experts_per_tok": 10}
    own |= {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    return delta_nets.complete_keys(complete_sparse_keys(own | keys))


def weights(config: Config) -> Rows:
    """Returns the weight table of a model with these numbers."""
    groups = config.num_delta_key_heads  # each has its queries, keys, values and gates in a row
    return [
        *delta_nets.attention_rows(config),
        *delta_nets.NET_ROWS,
        *projection_rows("in_proj_qkvz", ("query", "key", "value", "gate"), groups),
        *projection_rows("in_proj_ba", ("rate", "decay"), groups),
        *EXPERT_ROWS,
    ]


EXPERT_ROWS: Rows = [*expert_rows("model.layers.{}.mlp"), *SHARED]


def gguf_rows(config: Config) -> Rows:
    """Returns the rows of what llama.cpp's converter splits, and of what it leaves in groups."""
    return [
        *delta_gguf.rows(config),
        *projection_rows("in_proj_qkv", ("query", "key", "value")),
        *projection_rows("in_proj_z", ("gate",)),
        *projection_rows("in_proj_ba", ("rate", "decay"), config.num_delta_key_heads),
    ]


EXPERT_KEYS: dict[str, str | type] = {
    **SPARSE_KEYS,
    "shared_expert_intermediate_size": "shared_expert_dim",
}
GGUF_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    **GGUF_KEYS,
}

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    models="Qwen3-Next 80B-A3B, Qwen3-Coder-Next",
    config_class=Config,
    build=build,
    config_keys={**delta_nets.CONFIG_KEYS, **EXPERT_KEYS},
    config_aliases={"num_local_experts": "num_experts"},
    config_constants=delta_nets.CONFIG_CONSTANTS,
    config_nulls=["num_experts"],  # of which Transformers makes no model
    layer_types=("full_attention", "linear_attention"),
    complete_keys=complete_keys,
    weights=weights,
    ignored=delta_gguf.ignored,
    gguf_architecture="qwen3next",
    gguf_given=delta_gguf.given,
    gguf_keys={**delta_gguf.KEYS, **GGUF_EXPERT_KEYS},
    gguf_ignored=delta_gguf.IGNORED,
    gguf_offset=delta_gguf.OFFSET,
    gguf_rows=gguf_rows,
)
