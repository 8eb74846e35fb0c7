"""Experts as most families have them: softmax among all, the largest chosen."""

from collections.abc import Callable
from dataclasses import dataclass

from functional_llm.backbones.family import GATED_MLP, DecoderConfig, all_dense_rows, check_chosen
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import BesideX
from functional_llm.blocks.experts import Router, activated, expert_mlp, normalized, softmax
from functional_llm.graph.types import JSON, Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(DecoderConfig):
    """The numbers of a model whose MLPs are many, of which a router chooses some a token."""

    num_experts: int
    num_experts_per_token: int


@dataclass(frozen=True, kw_only=True)
class SparseConfig(ExpertsConfig):
    """The numbers of a model in which some layers have experts, and others one MLP."""

    expert_dim: int
    normalize_weights: bool
    dense_layers: tuple[int, ...]


def softmax_experts(
    config: ExpertsConfig,
    width: int,
    normalizes: bool,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> BesideX:
    """Returns gated experts; the weights of those chosen are their softmax among all.

    Args:
        config: The numbers of the model.
        width: Of an expert.
        normalizes: Whether the weights of a token are divided by their sum.
        shared: As for `expert_mlp`.
    """
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        scores=[softmax],
        weights=[normalized()] if normalizes else [],
    )
    return expert_mlp(router, width, config.hidden_dim, activated(config.activation), shared=shared)


def expert_rows(
    place: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Rows:
    """Returns the rows of a router and of gated experts, each expert with tensors of its own.

    Args:
        place: The layer of experts in a checkpoint.
        names: What its experts call gate, up and down.
    """
    parts = zip(("gate", "up", "down"), names, strict=True)
    return [
        (f"{place}.gate.weight", "decoder_{}/mlp/router/kernel", "transpose"),
        *(
            (
                f"{place}.experts[.{{expert}}].{name}.weight",
                f"decoder_{{}}/mlp/experts_{part}/kernel",
                "transpose",
            )
            for part, name in parts
        ),
    ]


def shared_rows(place: str) -> Rows:
    """Returns the rows of a gated MLP that all tokens take.

    Args:
        place: The layer in a checkpoint.
    """
    return all_dense_rows(place, "decoder_{}/mlp/shared", GATED_MLP)


SPARSE_KEYS: dict[str, str | type] = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "moe_intermediate_size": "expert_dim",
    "norm_topk_prob": "normalize_weights",
    "mlp_only_layers": "dense_layers",
    "decoder_sparse_step": int,
}


def complete_sparse_keys(keys: JSON) -> JSON:
    """Adds what most models do, and names the layers with one MLP."""
    own: JSON = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    keys = own | keys
    check_chosen(keys["num_experts_per_tok"], keys["num_experts"], "num_experts")
    step, layers = keys["decoder_sparse_step"], range(keys["num_hidden_layers"])
    if step < 1:
        raise ValueError(
            f"config.json: expected a decoder_sparse_step of at least 1, received {step}."
        )
    dense = [i for i in layers if i in keys["mlp_only_layers"] or (i + 1) % step != 0]
    return keys | {"mlp_only_layers": dense}


# Key of a GGUF file -> key of a `config.json`, beside the one that has their number.
GGUF_KEYS = {"expert_used_count": "num_experts_per_tok"}
