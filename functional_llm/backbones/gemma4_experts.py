"""The experts of a Gemma 4, which stand beside an MLP; its weight table with them and without."""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import gemma2, qwen3
from functional_llm.backbones.experts import shared_rows
from functional_llm.backbones.family import ModelConfig, expert_parameters
from functional_llm.backbones.sharing import PER_LAYER_ROWS
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.experts import (
    ExpertScale,
    Router,
    activated,
    expert_mlp,
    normalized,
    scaled,
    softmax,
)
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ModelConfig):
    """The numbers of experts, `None` if there are none."""

    num_experts: int | None
    num_experts_per_token: int | None
    expert_dim: int | None


def experts(config: ExpertsConfig, mlp: CompositeLayer) -> NamedPart:
    """Returns experts beside an MLP, each with norms of its own; the router sees no norm's result.

    Args:
        config: The numbers of the model.
        mlp: Which all tokens take.
    """
    norm, count = partial(rms_norm, config.layer_norm_epsilon), config.num_experts or 0
    router = Router(
        num_experts=count,
        num_chosen=config.num_experts_per_token or 0,
        inputs=[norm("router_norm"), scaled(config.hidden_dim**-0.5)],
        scores=[softmax],
        weights=[normalized()],
        rescaling=ExpertScale(count),
    )
    before, behind = norm("shared_norm"), norm("shared_post_norm")
    return expert_mlp(
        router,
        config.expert_dim or 0,
        config.hidden_dim,
        activated(config.activation),
        shared=lambda x: behind(mlp(before(x))),
        before=[norm("experts_norm")],
        behind=[norm("experts_post_norm")],
    )


_LAYER = "model.layers.{}"
_EXPERTS, _SHARED = "decoder_{}/mlp", "decoder_{}/mlp/shared"
PARAMETERS = (
    *expert_parameters("experts", "router.proj"),
    (f"{_LAYER}.router.scale", f"{_EXPERTS}/router_norm/scale", "same"),
    (f"{_LAYER}.router.per_expert_scale", f"{_EXPERTS}/expert_scale/scale", "same"),
)
_DENSE: Rows = [
    *gemma2.WEIGHTS,
    *qwen3.QK_NORMS,
    *PER_LAYER_ROWS,
    (f"{_LAYER}.layer_scalar", "decoder_{}/layer_scale/scale", "same"),
]
_ROUTED: Rows = [
    *PARAMETERS,
    *shared_rows(f"{_LAYER}.mlp"),
    (f"{_LAYER}.pre_feedforward_layernorm.weight", f"{_SHARED}_norm/scale", "same"),
    (f"{_LAYER}.post_feedforward_layernorm_1.weight", f"{_SHARED}_post_norm/scale", "same"),
    (f"{_LAYER}.pre_feedforward_layernorm_2.weight", f"{_EXPERTS}/experts_norm/scale", "same"),
    (
        f"{_LAYER}.post_feedforward_layernorm_2.weight",
        f"{_EXPERTS}/experts_post_norm/scale",
        "same",
    ),
]


def weights(config: ExpertsConfig) -> Rows:
    """Returns the weight table: with experts, the MLP beside them is another layer."""
    if config.num_experts is None:
        return _DENSE
    moved = {
        "decoder_{}/mlp_norm/scale",
        *(f"{_EXPERTS}/{x}/kernel" for x in ("gate", "up", "down")),
    }
    return [*(row for row in _DENSE if row[1] not in moved), *_ROUTED]
