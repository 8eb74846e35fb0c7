"""What families share whose experts are beside an MLP that all tokens take.

Some layers have one MLP instead, in most families the first ones; in some the experts come in
groups. Reference: [DeepSeek-V3](https://arxiv.org/abs/2412.19437), section
2.1.2.
"""

from dataclasses import dataclass
from functools import partial

from keras import ops

from functional_llm.backbones.experts import expert_rows, shared_rows
from functional_llm.backbones.family import ModelConfig, check_given
from functional_llm.backbones.transforms import Rows
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
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class MixedConfig(ModelConfig):
    """The numbers of a model in which some layers have experts, and others one MLP."""

    expert_dim: int


@dataclass(frozen=True, kw_only=True)
class GroupedConfig(ModelConfig):
    """The numbers of a router. With one group, all experts are open to a token."""

    num_experts: int
    num_experts_per_token: int
    routed_scale: float
    num_groups: int
    num_open_groups: int


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(GroupedConfig):
    """The numbers of one that scores experts one by one; a correction balances the choices."""

    normalize_weights: bool


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(MixedConfig, GroupedConfig):
    """The numbers of a model in which all layers but the first ones have experts."""

    num_shared_experts: int
    first_expert_layer: int


@dataclass(frozen=True, kw_only=True)
class CorrectedConfig(RoutedConfig, SigmoidConfig):
    """The numbers of such a model with a `sigmoid_router`."""


def build_mixed(
    config: MixedConfig,
    index: int,
    attention: CompositeLayer,
    router: Router | None,
    shared_dim: int,
    *,
    use_bias: bool = False,
    weighs_inputs: bool = False,
) -> CompositeLayer:
    """Returns the decoder layer of this number.

    Args:
        config: The numbers of the model.
        index: Of the layer.
        attention: Layer named "attention".
        router: What chooses experts; `None` for one MLP.
        shared_dim: Width of the MLP beside the experts; 0 for none.
        use_bias: Whether MLPs, experts aside, have biases.
        weighs_inputs: As for `expert_mlp`.
    """
    width, activation = config.hidden_dim, config.activation
    mlp: NamedPart = gated_mlp(config.intermediate_dim, width, activation, use_bias)
    if router is not None:
        shared = None
        if shared_dim:
            shared = gated_mlp(shared_dim, width, activation, use_bias, name="shared")
        gate, size = activated(activation), config.expert_dim
        mlp = expert_mlp(router, size, width, gate, weighs_inputs=weighs_inputs, shared=shared)
    norm = partial(rms_norm, config.layer_norm_epsilon)
    return pre_norm(f"decoder_{index}", norm, attention, mlp)


def build_decoder(
    config: RoutedConfig, index: int, attention: CompositeLayer, router: Router
) -> CompositeLayer:
    """Returns the decoder layer of this number: the first ones have no experts."""
    shared_dim = config.num_shared_experts * config.expert_dim
    there = router if index >= config.first_expert_layer else None
    return build_mixed(config, index, attention, there, shared_dim)


def sigmoid_router(config: SigmoidConfig) -> Router:
    """Returns what chooses by sigmoids; the correction counts in the choice, not in the weights."""
    groups, kept = config.num_groups, config.num_open_groups
    return Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        scores=[ops.sigmoid],
        choice=[ScoreCorrection(), *([within_groups(groups, kept, 2)] if kept < groups else [])],
        weights=[
            *([normalized(epsilon=1e-20)] if config.normalize_weights else []),
            scaled(config.routed_scale),
        ],
    )


# Without which Transformers makes no model.
ROUTING = (
    *("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
    *("n_shared_experts", "routed_scaling_factor"),
)
NO_NULLS = ("first_k_dense_replace", *ROUTING)


def check_routing(keys: JSON, least: int = 1) -> JSON:
    """Checks what `check_groups` does, and which layers have experts.

    Args:
        keys: Of a `config.json`, defaults among them.
        least: As for `check_groups`.
    """
    check_given(keys, NO_NULLS)
    check_groups(keys, least)
    if keys["first_k_dense_replace"] < 0:
        raise ValueError(
            "config.json: expected a first_k_dense_replace of at least 0, received "
            f"{keys['first_k_dense_replace']}."
        )
    return keys


def check_groups(keys: JSON, least: int = 1) -> None:
    """Checks that as many experts and groups can be chosen as shall be.

    Args:
        keys: Of a `config.json`, defaults among them.
        least: How many experts a group has at least, if there are several.

    Raises:
        ValueError: If they cannot.
    """
    experts = keys["n_routed_experts"]
    # Those that are not there fit nowhere.
    chosen, groups, kept = (
        keys.get(key) or experts + 1 for key in ("num_experts_per_tok", "n_group", "topk_group")
    )
    fits = experts % groups == 0 and kept <= groups and chosen <= experts // groups * kept
    if not fits or (groups > 1 and experts // groups < least):
        raise ValueError(
            "config.json: expected n_group that divides n_routed_experts into groups of at least "
            f"{least}, topk_group of them, and num_experts_per_tok experts at most in those. "
            f"Received: n_routed_experts={experts}, n_group={keys.get('n_group')}, "
            f"topk_group={keys.get('topk_group')}, "
            f"num_experts_per_tok={keys.get('num_experts_per_tok')}."
        )


_MLP = "model.layers.{}.mlp"
CORRECTION = "decoder_{}/mlp/correction/bias"
ROWS: Rows = [*expert_rows(_MLP), *shared_rows(f"{_MLP}.shared_experts")]
CORRECTED_ROWS: Rows = [*ROWS, (f"{_MLP}.gate.e_score_correction_bias", CORRECTION, "same")]

CONFIG_KEYS: dict[str, str | type] = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "expert_dim",
    "first_k_dense_replace": "first_expert_layer",
    "routed_scaling_factor": "routed_scale",
    "n_group": "num_groups",
    "topk_group": "num_open_groups",
}
GGUF_KEYS = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
