"""Adapters in stock Keras: their weights become tensors, and all methods' formulas stay theirs."""

from typing import Any

import keras
from keras import ops

from functional_llm.peft.adapter import Adapter
from functional_llm.peft.linear import Linear
from functional_llm.stock.lowering import indices, register_lowering


class _CalledLinear(Linear):
    """A view of a stock layer that can be called only: its weights are told by what it returns.

    Args:
        linear: The view of the original.
        layer: Its shared copy in the stock graph.
        x: A tensor of the graph.
    """

    def __init__(self, linear: Linear, layer: Any, x: Any) -> None:
        vars(self).update(vars(linear))
        self.layer = layer
        self._row = ops.one_hot(indices(self.in_size, x), self.in_size, dtype="float32")

    def kernel(self) -> Any:
        matrix = self.product(ops.reshape(self._row, self._in_shape(self.in_size)))
        return ops.reshape(matrix, (self.in_size, self.out_size))

    def bias(self) -> Any:
        if self.layer.bias is None:
            return None
        nothing = ops.reshape(ops.sum(self._row * 0, axis=0), self._in_shape(1))
        return ops.reshape(ops.cast(self.layer(nothing), "float32"), (self.out_size,))

    def product(self, x: Any) -> Any:
        output, bias = ops.cast(self.layer(x), "float32"), self.bias()
        return output if bias is None else output - self.as_output(bias)

    def _in_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of so many inputs; all axes before those of a row but one are 1."""
        if isinstance(self.layer, keras.layers.Dense):
            return rows, self.in_size
        sizes = self._shape[: self._axes[0]]
        others = len(self.layer.equation.split(",")[0].strip().replace("...", "")) - len(sizes)
        return (*(1,) * (others - 1), rows, *sizes)


def _lower_adapter(adapter: Any, x: Any, training: bool | None = None) -> Any:
    """Calls the method's own code; an adapter keeps its switch as it is now."""
    adapter.linear = _CalledLinear(adapter.linear, adapter.place(adapter.linear.layer), x)
    return type(adapter).call(adapter, x, training=training)


register_lowering(Adapter, _lower_adapter)
