"""GLM-4.5 and later: experts chosen by corrected sigmoids, RoPE on half of each head's channels.

The first layers have one MLP; in all others each token also takes a shared one. Checkpoints hold
one more layer, which predicts the token after the next: it is not read. Reference:
[GLM-4.5](https://arxiv.org/abs/2508.06471).
"""

from dataclasses import dataclass

import keras
from keras import ops

from functional_llm.backbones import llama, qwen3
from functional_llm.backbones.experts import expert_rows
from functional_llm.backbones.family import (
    COMMON_KEYS,
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
    dense_rows,
)
from functional_llm.backbones.stacks import build_around, with_rope
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.experts import (
    Router,
    ScoreCorrection,
    activated,
    expert_mlp,
    normalized,
    scaled,
    within_groups,
)
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a GLM-4.5, beside those of `PartialRotaryConfig`."""

    attention_bias: bool
    query_key_norm: bool
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    num_groups: int
    num_kept_groups: int
    expert_dim: int
    normalize_weights: bool
    weight_scale: float
    first_expert_layer: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [("full_attention", build_decoder(config, i)) for i in range(config.num_layers)]
    return build_around(config, layers, {"full_attention": with_rope(config)})


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""

    def part(num_heads: int, name: str) -> list[Part]:
        project = heads(num_heads, config.head_dim, name, config.attention_bias)
        norms = [rms_norm(config.layer_norm_epsilon, f"{name}_norm")]
        return [project, *(norms if config.query_key_norm else []), on_first_channels(rotary())]

    self_attention = attention(
        query=part(config.num_query_heads, "query"),
        key=part(config.num_key_value_heads, "key"),
        value=[heads(config.num_key_value_heads, config.head_dim, "value", config.attention_bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp: NamedPart = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    if index >= config.first_expert_layer:
        mlp = experts(config)
    norm = config.layer_norm_epsilon
    return pre_norm(f"decoder_{index}", lambda part: rms_norm(norm, part), self_attention, mlp)


def experts(config: Config) -> NamedPart:
    """Returns the MLPs of which a token takes some, and the shared one."""
    groups = [within_groups(config.num_groups, config.num_kept_groups, num_best=2)]
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        scores=[ops.sigmoid],
        choice=[ScoreCorrection(), *(groups if config.num_kept_groups < config.num_groups else [])],
        weights=[
            *([normalized(epsilon=1e-20)] if config.normalize_weights else []),
            scaled(config.weight_scale),
        ],
    )
    gate = activated(config.activation)
    width = config.expert_dim * config.num_shared_experts
    shared = gated_mlp(width, config.hidden_dim, config.activation, name="shared")
    return expert_mlp(router, config.expert_dim, config.hidden_dim, gate, shared=shared)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    own |= {"attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 0.5}
    own |= {"n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1}
    own |= {"moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    own |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    keys = complete_common_keys(own | keys)
    names = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    count, chosen, groups, kept = (keys[name] for name in names)
    if count % groups or count // groups < 2 or kept > groups or chosen > count // groups * kept:
        raise ValueError(
            "config.json: expected n_routed_experts in n_group equal groups of at least two, a "
            "topk_group of at most n_group, and num_experts_per_tok of at most the experts in so "
            f"many groups. Received: {[keys[name] for name in names]}."
        )
    return keys


_MLP = "model.layers.{}.mlp"
_CORRECTION = "decoder_{}/mlp/correction/bias"
SHARED: Rows = [
    row
    for x in ("gate", "up", "down")
    for row in dense_rows(f"{_MLP}.shared_experts.{x}_proj", f"decoder_{{}}/mlp/shared/{x}")
]


def ignored(config: Config) -> list[str]:
    """Returns the patterns of the tensors of the layer behind the last, here and in GGUF files."""
    return [*ROPE_BUFFERS, *(f"{x}.{config.num_layers}.*" for x in ("model.layers", "blk"))]


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    models="GLM-4.5, 4.5-Air, 4.6, 4.7",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "attention_bias": "attention_bias",
        "partial_rotary_factor": "partial_rotary_factor",
        "use_qk_norm": "query_key_norm",
        "n_routed_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
        "n_group": "num_groups",
        "topk_group": "num_kept_groups",
        "moe_intermediate_size": "expert_dim",
        "norm_topk_prob": "normalize_weights",
        "routed_scaling_factor": "weight_scale",
        "first_k_dense_replace": "first_expert_layer",
        "num_nextn_predict_layers": int,
    },
    config_aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    complete_keys=complete_keys,
    written_keys=lambda config: {"num_nextn_predict_layers": 0},
    weights=[
        *llama.WEIGHTS,
        *qwen3.QK_NORMS,
        *expert_rows(_MLP),
        *SHARED,
        (f"{_MLP}.gate.e_score_correction_bias", _CORRECTION, "same"),
    ],
    ignored=ignored,
    gguf_architecture="glm4moe",
    gguf_keys={
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "n_shared_experts",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "leading_dense_block_count": "first_k_dense_replace",
    },
    gguf_ignored=["expert_gating_func"],
    gguf_rows=lambda config: [(f"{_MLP}.gate.e_score_correction.bias", _CORRECTION, "same")],
)
