"""Feed-forward blocks."""

from collections.abc import Callable

import keras
from keras import ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu,
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_approximate": lambda x: ops.gelu(x, approximate=True),
    "relu": ops.relu,
}


def gated_mlp(
    intermediate_dim: int, hidden_dim: int, activation: str, use_bias: bool = False
) -> CompositeLayer:
    """down(activation(gate(x)) * up(x)), each a Dense.

    Args:
        intermediate_dim: Width of gate and up.
        hidden_dim: Width of the result.
        activation: A key of `ACTIVATIONS`.
        use_bias: Whether the three Dense layers have a bias.

    Reference:
        [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202).
    """
    gate = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="gate")
    up = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="up")
    down = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="down")

    def body(x: Tensor) -> Tensor:
        return down(ACTIVATIONS[activation](gate(x)) * up(x))

    return CompositeLayer(body, name="mlp")


def mlp(intermediate_dim: int, hidden_dim: int, activation: str) -> CompositeLayer:
    """down(activation(up(x))), each a Dense with a bias.

    Args:
        intermediate_dim: Width in the middle.
        hidden_dim: Width of the result.
        activation: A key of `ACTIVATIONS`.
    """
    up = keras.layers.Dense(intermediate_dim, name="up")
    down = keras.layers.Dense(hidden_dim, name="down")
    return CompositeLayer(lambda x: down(ACTIVATIONS[activation](up(x))), name="mlp")
