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
    "gelu_10": lambda x: ops.clip(ops.gelu(x, approximate=False), -10.0, 10.0),
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),
    "relu": ops.relu,
    "relu2": lambda x: ops.square(ops.relu(x)),
    "relu6": ops.relu6,
    "leaky_relu": lambda x: ops.leaky_relu(x, 0.01),
    "hard_silu": ops.hard_silu,
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "linear": lambda x: x,
    "laplace": lambda x: 0.5 * (1.0 + ops.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "sqrt_softplus": lambda x: ops.sqrt(ops.softplus(x)),
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


def mlp(
    intermediate_dim: int, hidden_dim: int, activation: str, use_bias: bool = True
) -> CompositeLayer:
    """down(activation(up(x))), each a Dense.

    Args:
        intermediate_dim: Width in the middle.
        hidden_dim: Width of the result.
        activation: A key of `ACTIVATIONS`.
        use_bias: Whether the two Dense layers have a bias.
    """
    up = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="up")
    down = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="down")
    return CompositeLayer(lambda x: down(ACTIVATIONS[activation](up(x))), name="mlp")
