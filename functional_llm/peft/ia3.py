"""IA3: a factor for each output of a layer, or for each of its inputs."""

from collections.abc import Callable
from typing import Any

import keras

from functional_llm.graph.selection import Where
from functional_llm.graph.types import Layer, Tensor
from functional_llm.peft.adapter import Adapter, attach, find_targets, has_named
from functional_llm.peft.linear import Linear

_USUAL = ("key", "value", "down")


@keras.saving.register_keras_serializable("functional_llm")
class IA3(Adapter):
    """`l * (x W + b)`, or `(l * x) W + b` if it scales the inputs; l is 1 at first."""

    peft_type = "IA3"

    scales_inputs: bool = False

    def make_weights(self, linear: Linear) -> None:
        size = linear.in_size if self.scales_inputs else linear.out_size
        self.scale = self.add_weight((size,), "ones", name="scale")

    def kernel_change(self) -> Tensor:
        scale = self.scale[:, None] if self.scales_inputs else self.scale
        return self.linear.kernel() * (scale - 1)

    def bias_change(self) -> Tensor | None:
        bias = self.linear.bias()
        return None if bias is None or self.scales_inputs else bias * (self.scale - 1)

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        if self.scales_inputs:
            return self.linear.product(x * self.linear.as_input(self.scale - 1))
        bias = self.linear.bias()
        output = self.linear.product(x)
        output = output if bias is None else output + self.linear.as_output(bias)
        return output * self.linear.as_output(self.scale - 1)


def ia3(
    model: keras.Model,
    targets: Where = _USUAL,
    feedforward: Where = "down",
    adapter_name: str = "default",
    dtype: str = "float32",
) -> keras.Model:
    """Returns a model in which only a factor for each output, or input, of some layers trains.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer except the head.
            A model with experts may have no "down", which it need not have.
        feedforward: Which of them have their inputs scaled; an empty list for none.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [IA3](https://arxiv.org/abs/2205.05638), section 3.3.
    """
    if not has_named(model, "down"):
        usual = _named("key", "value") if has_named(model, "key") else _named("input")
        targets = usual if targets == _USUAL else targets
        feedforward = [] if feedforward == "down" else feedforward
    scaled = find_targets(model, feedforward) if feedforward else {}

    def make(layer: Layer, path: str, **kwargs: Any) -> IA3:
        return IA3(layer, scales_inputs=path in scaled, **kwargs)

    return attach(model, make, targets, adapter_name, dtype=dtype)


def _named(*names: str) -> Callable[[Layer, str], bool]:
    return lambda layer, path: path.rpartition("/")[2] in names
