"""Which kernel each layer of attention and of experts takes, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras

from functional_llm.graph.capturing import capture
from functional_llm.graph.selection import select
from functional_llm.kernels import choose_attention, choose_experts
from functional_llm.layers.attention import AttentionDotProduct
from functional_llm.layers.experts import ExpertDispatch


class AttentionChoice(NamedTuple):
    """The kernel of one layer.

    Args:
        path: Of the `AttentionDotProduct`, or of the `ExpertDispatch`.
        kernel: The kernel's name.
        reason: Why it is this one.
    """

    path: str
    kernel: str
    reason: str


def attention_choices(
    backbone: keras.Model, batch_size: int = 1, tokens: int = 2048, packed: bool = False
) -> list[AttentionChoice]:
    """Returns the kernel that each `AttentionDotProduct` takes on this machine's device.

    Nothing is computed: shapes go through the graph as it is, rewired or not.

    Args:
        backbone: A model with the inputs of a Backbone.
        batch_size: Rows.
        tokens: Tokens of a row.
        packed: Whether rows hold several segments.
    """
    return _choices(AttentionDotProduct, choose_attention, backbone, batch_size, tokens, packed)


def expert_choices(
    backbone: keras.Model, batch_size: int = 1, tokens: int = 2048
) -> list[AttentionChoice]:
    """Returns the kernel that each `ExpertDispatch` takes on this machine's device.

    Args:
        backbone: A model with the inputs of a Backbone.
        batch_size: Rows.
        tokens: Tokens of a row.
    """
    return _choices(ExpertDispatch, choose_experts, backbone, batch_size, tokens)


def _choices(
    kind: type,
    choose: Callable[..., Any],
    backbone: keras.Model,
    batch_size: int,
    tokens: int,
    packed: bool = False,
) -> list[AttentionChoice]:
    def is_kind(layer: keras.layers.Layer, path: str) -> bool:
        return isinstance(layer, kind)

    layers = select(backbone, is_kind)
    captured = capture(backbone, is_kind, inputs=True)
    ids = jax.ShapeDtypeStruct((batch_size, tokens), "int32")
    inputs = {"token_ids": ids} | ({"segment_ids": ids, "positions": ids} if packed else {})
    choices: list[AttentionChoice] = []

    def trace(inputs: Any) -> None:
        received = captured(inputs)["captured"]
        for path, layer in layers.items():
            kernel, reason = choose(layer.facts(received[path]), layer.kernel)
            choices.append(AttentionChoice(path, kernel.name, reason))

    jax.eval_shape(trace, inputs)
    return choices


def explain_attention(
    backbone: keras.Model, batch_size: int = 1, tokens: int = 2048, packed: bool = False
) -> None:
    """Prints which kernel of attention the layers take on this machine's device, and why.

    Args:
        backbone: A model with the inputs of a Backbone.
        batch_size: Rows.
        tokens: Tokens of a row.
        packed: Whether rows hold several segments, as in the training of short texts.
    """
    choices = attention_choices(backbone, batch_size, tokens, packed)
    _print(choices, f"{batch_size} x {tokens} tokens{', packed' if packed else ''}")


def explain_experts(backbone: keras.Model, batch_size: int = 1, tokens: int = 2048) -> None:
    """Prints how the layers with experts are computed on this machine's device, and why.

    Args:
        backbone: A model with the inputs of a Backbone.
        batch_size: Rows.
        tokens: Tokens of a row.
    """
    _print(expert_choices(backbone, batch_size, tokens), f"{batch_size} x {tokens} tokens")


def _print(choices: list[AttentionChoice], what: str) -> None:
    paths: dict[tuple[str, str], list[str]] = {}
    for path, *choice in choices:
        paths.setdefault((choice[0], choice[1]), []).append(path)
    print(f"{what}, {jax.default_backend()}:")
    for (kernel, reason), layers in paths.items():
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        print(f"  {kernel}: {layers[0]}{others}\n    {reason}")
