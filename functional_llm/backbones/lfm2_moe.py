"""LFM2 with experts: an LFM2 in which the MLPs of all but the first layers are many.

A router chooses some of them a token, by a sigmoid of each and a correction that counts in the
choice only. Reference: [LFM2](https://arxiv.org/abs/2511.23404), section 2.
"""

from dataclasses import dataclass

from keras import ops

from functional_llm.backbones import lfm2, lfm2_keys
from functional_llm.backbones.experts import expert_rows
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    check_chosen,
    complete_common_keys,
    expert_parameters,
)
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.experts import (
    Router,
    ScoreCorrection,
    activated,
    expert_mlp,
    normalized,
    scaled,
)
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(lfm2.Config):
    """The numbers of an LFM2 with experts, beside those of an LFM2."""

    num_experts: int
    num_experts_per_token: int
    expert_dim: int
    first_expert_layer: int
    corrects_choice: bool
    normalize_weights: bool
    routed_scale: float


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    mlps = [build_mlp(config, i) for i in range(config.num_layers)]
    return lfm2.build(config, mlps)


def build_mlp(config: Config, index: int) -> NamedPart:
    """Returns the MLP of the decoder layer of this number, or its experts."""
    width, activation = config.hidden_dim, config.activation
    if index < config.first_expert_layer:
        return gated_mlp(config.intermediate_dim, width, activation)
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        scores=[ops.sigmoid],
        choice=[ScoreCorrection()] if config.corrects_choice else [],
        weights=[
            *([normalized(epsilon=1e-6)] if config.normalize_weights else []),
            scaled(config.routed_scale),
        ],
    )
    return expert_mlp(router, config.expert_dim, width, activated(activation))


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }
    keys = lfm2_keys.DEFAULTS | own | keys
    check_chosen(keys["num_experts_per_tok"], keys["num_experts"], "num_experts")
    return complete_common_keys(keys)


_MLP = "model.layers.{}.feed_forward"

FAMILY = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    models="LFM2 8B-A1B",
    config_class=Config,
    build=build,
    config_keys={
        **lfm2_keys.KIN,
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_dim",
        "num_dense_layers": "first_expert_layer",
        "use_expert_bias": "corrects_choice",
        "norm_topk_prob": "normalize_weights",
        "routed_scaling_factor": "routed_scale",
    },
    config_aliases=lfm2.FAMILY.config_aliases,
    config_constants={"hidden_act": "silu"},
    layer_types=lfm2.FAMILY.layer_types,
    complete_keys=complete_keys,
    weights=[
        *lfm2.WEIGHTS,
        *expert_rows(_MLP, ("w1", "w3", "w2")),
        (f"{_MLP}.expert_bias", "decoder_{}/mlp/correction/bias", "same"),
    ],
    parameters=expert_parameters("feed_forward.experts", "feed_forward.gate"),
    ignored=ROPE_BUFFERS,
    gguf_architecture="lfm2moe",
    gguf_keys={
        **lfm2.FAMILY.gguf_keys,
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "leading_dense_block_count": "num_dense_layers",
    },
    gguf_ignored=["expert_gating_func"],
    gguf_rows=lambda config: [
        *lfm2.gguf_rows(config),
        (f"{_MLP}.expert_bias.bias", "decoder_{}/mlp/correction/bias", "same"),
    ],
)
