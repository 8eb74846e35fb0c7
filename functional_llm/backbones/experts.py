"""Experts as most families have them: softmax among all, the largest chosen."""

from collections.abc import Callable
from dataclasses import dataclass

from functional_llm.backbones.family import DecoderConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import BesideX
from functional_llm.blocks.experts import Router, activated, expert_mlp, normalized, softmax
from functional_llm.graph.types import JSON, Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(DecoderConfig):
    """The numbers of a model whose MLPs are many, of which a router chooses some a token."""

    num_experts: int
    num_experts_per_token: int


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


def check_experts(keys: JSON, key: str = "num_experts") -> None:
    """Checks that as many experts are chosen as there are, or fewer.

    Args:
        keys: Of a `config.json`.
        key: The one with the number of experts.

    Raises:
        ValueError: If there are fewer, or none.
    """
    count, experts = keys["num_experts_per_tok"], keys[key]
    if experts is None or count is None or not 1 <= count <= experts:
        raise ValueError(
            f"config.json: expected num_experts_per_tok from 1 to {key}. Received: {count} and "
            f"{experts}."
        )


# Key of a GGUF file -> key of a `config.json`, beside the one that has their number.
GGUF_KEYS = {"expert_used_count": "num_experts_per_tok"}
