"""Lowers adapters to stock Keras: their weights become tensors; methods keep their own formulas."""

import keras
from keras import ops

from functional_llm.graph.types import Layer, Nested, Tensor
from functional_llm.peft.adapter import Adapter
from functional_llm.peft.linear import ExpertLinear, Linear, Lookup
from functional_llm.peft.retrained import Retrained
from functional_llm.stock.lowering import indices, register_lowering


class _ProbedLinear(Linear):
    """A view of a stock layer that can only be called: its outputs for unit vectors are its matrix.

    Args:
        linear: The view of the original.
        layer: The stock layer in the place of the original.
        x: A tensor of the graph.
    """

    def __init__(self, linear: Linear, layer: Layer, x: Tensor) -> None:
        vars(self).update(vars(linear))
        self._original, self.layer = linear.layer, layer
        self._unit_vectors = ops.one_hot(indices(self.in_size, x), self.in_size, dtype="float32")

    def kernel(self) -> Tensor:
        matrix = self.product(ops.reshape(self._unit_vectors, self._in_shape(self.in_size)))
        return ops.reshape(matrix, (self.in_size, self.out_size))

    def bias(self) -> Tensor | None:
        if self.layer.bias is None:
            return None
        nothing = ops.reshape(ops.sum(self._unit_vectors * 0, axis=0), self._in_shape(1))
        return ops.reshape(ops.cast(self.layer(nothing), "float32"), (self.out_size,))

    def product(self, x: Tensor) -> Tensor:
        output, bias = ops.cast(self.layer(x), "float32"), self.bias()
        return output if bias is None else output - self.as_output(bias)

    def _in_shape(self, rows: int) -> tuple[int, ...]:
        """Returns the shape of that many inputs; all other axes before those of a row are 1."""
        if isinstance(self._original, keras.layers.Dense):
            return rows, self.in_size
        sizes = self._shape[: self._axes[0]]
        others = len(self.layer.equation.split(",")[0].strip().replace("...", "")) - len(sizes)
        return (*(1,) * (others - 1), rows, *sizes)


class _ProbedExperts(ExpertLinear):
    """The same of experts, whose matrices no method needs that changes them."""

    def __init__(self, linear: ExpertLinear, layer: Layer, x: Nested) -> None:
        vars(self).update(vars(linear))
        self.layer = layer


class _ProbedLookup(Lookup):
    """The same of an embedding: what it returns for all tokens is its matrix."""

    def __init__(self, linear: Lookup, layer: Layer, x: Tensor) -> None:
        vars(self).update(vars(linear))
        self.layer = layer
        self.takes_integers = linear.takes_integers
        size = self.in_size if self.takes_integers else self.out_size
        self._tokens = indices(size, x)

    def kernel(self) -> Tensor:
        table = ops.cast(self.layer(self._tokens), "float32")
        return table if self.takes_integers else ops.transpose(table)

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        return super().apply(x, matrix) if self.takes_integers else ops.matmul(x, matrix)


_PROBED: dict[type, type] = {
    Lookup: _ProbedLookup,
    ExpertLinear: _ProbedExperts,
    Linear: _ProbedLinear,
}


def _lower_adapter(
    adapter: Adapter, x: Tensor, training: bool | None = None, reverse: bool = False
) -> Tensor:
    """Calls the method's own code; whether the adapter is active stays as it is now."""
    if not isinstance(adapter.linear, tuple(_PROBED.values())):  # as after the first call
        kinds = (probed for kind, probed in _PROBED.items() if isinstance(adapter.linear, kind))
        adapter.linear = next(kinds)(adapter.linear, adapter.place(adapter.linear.layer), x)
    kwargs = {"reverse": True} if reverse else {}
    return type(adapter).call(adapter, x, training=training, **kwargs)


def _lower_retrained(
    adapter: Retrained, x: Tensor, training: bool | None = None, reverse: bool = False
) -> Tensor:
    """Calls both layers, so that both have their weights in the file."""
    base = adapter.call_base(x, reverse)
    if not adapter.changes(reverse):
        return base
    kwargs = {"reverse": True} if reverse else {}
    before = base
    if adapter.is_stacked and adapter.linear is not None:
        before = adapter.place(adapter.linear.layer)(x, **kwargs)
    return adapter.activation(base + (adapter.inner(x, **kwargs) - before) * adapter.gate)


register_lowering(Adapter, _lower_adapter)
register_lowering(Retrained, _lower_retrained)
