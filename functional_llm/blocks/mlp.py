"""Feed-forward blocks."""

from collections.abc import Callable

import keras
from keras import ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Layer, Tensor

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
    intermediate_dim: int,
    hidden_dim: int,
    activation: str | Callable[[Tensor], Tensor],
    use_bias: bool = False,
    name: str = "mlp",
) -> CompositeLayer:
    """down(activation(gate(x)) * up(x)), each a Dense.

    Args:
        intermediate_dim: Width of gate and up.
        hidden_dim: Width of the result.
        activation: A key of `ACTIVATIONS`, or a function.
        use_bias: Whether the three Dense layers have a bias.
        name: Of the layer.

    Reference:
        [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202).
    """
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    gate = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="gate")
    up = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="up")
    down = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="down")

    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def body(x: Tensor) -> Tensor:
        return down(act(gate(x)) * up(x))

    return CompositeLayer(body, name=name)


def mlp(
    intermediate_dim: int,
    hidden_dim: int,
    activation: str | Layer,
    use_bias: bool = True,
    name: str = "mlp",
) -> CompositeLayer:
    """down(activation(up(x))), each a Dense.

    Args:
        intermediate_dim: Width in the middle.
        hidden_dim: Width of the result.
        activation: A key of `ACTIVATIONS`, or a layer.
        use_bias: Whether the two Dense layers have a bias.
        name: Of the layer.
    """
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    up = keras.layers.Dense(intermediate_dim, use_bias=use_bias, name="up")
    down = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="down")
    return CompositeLayer(lambda x: down(act(up(x))), name=name)


@keras.saving.register_keras_serializable("functional_llm")
class XIELU(CompositeLayer):
    """Activation that grows with the square of a number above zero, and stays below beta * x else.

    With p = softplus(alpha_p) and n = beta + softplus(alpha_n), x becomes p * x^2 + beta * x if
    it is positive, and n * (exp(min(x, eps)) - 1 - x) + beta * x otherwise. Beta and eps are not
    trained.

    Reference:
        [Deriving Activation Functions Using Integration](https://arxiv.org/abs/2411.13010); its
        code, and with it Transformers' `XIELUActivation`, has eps.
    """

    def functional_build(self, inputs: Tensor) -> Tensor:
        def weight(name: str, value: float, trainable: bool) -> Tensor:
            constant = keras.initializers.Constant(value)
            return self.add_weight((1,), constant, name=name, trainable=trainable)

        # softplus(0.204) = 0.8, and 0.5 + softplus(-1.05) = 0.8: where training begins.
        alpha_p, alpha_n = weight("alpha_p", 0.2036, True), weight("alpha_n", -1.0502, True)
        beta, eps = weight("beta", 0.5, False), weight("eps", -1e-6, False)
        # A weight by itself is no node of a graph: the zero, one for each token, makes it one.
        zero = ops.zeros_like(inputs[..., :1])
        positive, negative = ops.softplus(zero + alpha_p), ops.softplus(zero + alpha_n) + beta
        curved = ops.where(
            inputs > 0,
            positive * inputs * inputs,
            negative * (ops.expm1(ops.minimum(inputs, eps)) - inputs),
        )
        return curved + inputs * beta
