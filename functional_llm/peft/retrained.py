"""Layers that train themselves, as a part of an adapter: PEFT's `modules_to_save` and `bias`."""

from collections.abc import Sequence

import keras
from keras import ops

from functional_llm.graph.keras_private import exchange_variables
from functional_llm.graph.rewiring import shared_copy
from functional_llm.graph.selection import Where, select, walk
from functional_llm.graph.types import Layer, Tensor
from functional_llm.peft.adapter import Adapter, join, origin_of
from functional_llm.peft.linear import MATRIX_LAYERS, Linear, view


@keras.saving.register_keras_serializable("functional_llm")
class Retrained(Adapter):
    """The layer with weights of its own, which are the base's at first.

    `names` are those of the weights that it has of its own; `None` for all.
    """

    names: Sequence[str] | None = None

    def make_weights(self, linear: Linear | None = None) -> None:
        self.inner = shared_copy(self.origin)
        new = {}
        for variable in self.origin.weights:
            if self.names is not None and variable.name not in self.names:
                continue
            if variable.dtype == "int8":
                raise ValueError(f"Expected a layer that is not quantised: '{self.name}'.")
            own = self.add_weight(variable.shape, "zeros", name=variable.name)
            # A copy: training donates a variable's array, which another must not hold.
            own.assign(ops.copy(ops.cast(variable, own.dtype)))
            new[id(variable)] = own
        exchange_variables(self.inner, new)
        half = self.inner.compute_dtype
        if half in ("bfloat16", "float16") and self.variable_dtype == "float32":
            self.inner.dtype_policy = keras.DTypePolicy(f"mixed_{half}")

    def call(self, x: Tensor, training: bool | None = None, reverse: bool = False) -> Tensor:
        if not self.changes(reverse):
            return self.call_base(x, reverse)

        def own() -> Tensor:
            return self.inner(x, reverse=True) if reverse else self.inner(x)

        if self.is_stacked:  # their changes add up
            before = self.origin(x, reverse=True) if reverse else self.origin(x)
            change = ops.cast(self.gate, before.dtype) * (own() - before)
            return self.activation(self.call_base(x, reverse) + change)

        def base() -> Tensor:
            return self.call_base(x, reverse)

        def both() -> Tensor:
            y = base()
            return y + ops.cast(self.gate, y.dtype) * (own() - y)

        def weighted() -> Tensor:
            return ops.cond(ops.equal(self.gate, 0.0), base, both)

        return self.activation(ops.cond(ops.equal(self.gate, 1.0), own, weighted))

    def kernel_change(self) -> Tensor | None:
        if self.names is not None and not {*self.names} - {"bias"}:
            return None
        return view(self.inner, bool(self.reverse)).kernel() - self.linear.kernel()

    def bias_change(self) -> Tensor | None:
        bias = self.linear.bias()
        return None if bias is None else view(self.inner).bias() - bias


def retrain(
    model: keras.Model,
    targets: Where,
    names: Sequence[str] | None = None,
    adapter_name: str = "default",
    dtype: str = "float32",
) -> keras.Model:
    """Returns a model in which the weights of some layers train, in copies of their own.

    ```python
    model = flm.peft.retrain(flm.peft.lora(backbone), ["final_norm", "head"])
    ```

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; any with weights.
        names: Of their weights, which train: `["bias"]`. All by default.
        adapter_name: Of the adapter that they become a part of, or of a new one.
        dtype: Of the copies.

    Raises:
        ValueError: If the targets match no layer with such a weight.
    """
    leaves = dict(walk(model))
    fitting = {
        path
        for path in select(model, targets)
        if path in leaves and _has_any(origin_of(leaves[path]), names)
    }
    if not fitting:
        raise ValueError(f"Expected targets with weights {names or 'of any name'}: {targets!r}.")
    return join(model, Retrained, list(fitting), adapter_name, names=names, dtype=dtype)


def _has_any(layer: Layer, names: Sequence[str] | None) -> bool:
    return any(names is None or x.name in names for x in layer.weights)


def retrained_copy(layer: Layer, inners: Sequence[tuple[Layer, float]]) -> Layer:
    """Returns a layer of the same class and config, with the weighted changes of others in it."""
    if isinstance(layer, MATRIX_LAYERS) and layer.quantization_mode is not None:
        raise ValueError(f"Expected a layer that is not quantised: '{layer.name}'.")
    new = type(layer).from_config(layer.get_config())
    new.build_from_config(layer.get_build_config())
    for i, (variable, before) in enumerate(zip(new.weights, layer.weights, strict=True)):
        values = [(inner.weights[i], weight) for inner, weight in inners]
        if len(values) == 1 and values[0][1] == 1:
            value = values[0][0]
        else:
            base = ops.cast(before, "float32")
            value = base + sum(w * (ops.cast(x, "float32") - base) for x, w in values)
        variable.assign(ops.copy(ops.cast(value, variable.dtype)))
    return new
