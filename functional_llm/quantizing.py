"""Quantising: a model whose matrices are int8, as a rewiring.

Stock Dense layers and embeddings can hold int8: a scale for each output channel, found once; inputs
are quantised a row at a time, when they come. Products of int8 sum up in int32, all else is in the
model's own precision. The formulas are Keras's, and so such a model can be saved as a stock file.

A row of inputs goes in as two: what int8 makes of it, and what that leaves of it. Language models
have a few inputs far larger than the rest, which would not survive otherwise. Reading the matrix is
what takes time in decoding, and that is done once for both.

A single row, as in decoding one text, is not quantised at all: what takes time then is reading the
matrix, which is int8 all the same.

Shapes: D inputs, F outputs.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import keras
from keras import ops

from functional_llm.convert.table import uninitialized
from functional_llm.export import register_lowering
from functional_llm.rewiring import rewire
from functional_llm.selecting import Where, select, walk

_LAYERS = (keras.layers.Dense, keras.layers.Embedding)


def in_two_rows(linear: Callable[[Any], Any], x: Any) -> Any:
    """Returns `linear(x)` of a function that quantises its rows, with twice the bits.

    Args:
        linear: From (..., 2, D) to (..., 2, F): a product, perhaps with a bias.
        x: (..., D).
    """
    peak = ops.max(ops.abs(x), axis=-1, keepdims=True) + keras.config.epsilon()
    coarse = ops.stop_gradient(ops.round(x * (127 / peak)) * (peak / 127))
    # Twice of each, and the mean of both: so the bias counts once.
    rows = ops.stack([2 * coarse, 2 * (x - coarse)], axis=-2)
    return ops.mean(linear(rows), axis=-2)


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedDense(keras.layers.Dense):
    """Keras's own; of several rows of inputs, each goes in as two (see `in_two_rows`)."""

    def quantized_call(self, inputs: Any, training: bool | None = None) -> Any:
        if not _is_single_row(inputs) or self.lora_enabled:
            return in_two_rows(super().quantized_call, inputs)
        outputs = _product(inputs, self._kernel, self.kernel_scale)
        return outputs if self.bias is None else ops.add(outputs, self.bias)


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Keras's own, likewise where it is the head, and with a gradient.

    Rounding has none; Keras passes it by for Dense, and forgets to where an embedding is the head.
    """

    def quantized_call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            return super().quantized_call(inputs)
        if self.tie_weights:
            kernel, scale = ops.transpose(self._embeddings), self.embeddings_scale
        else:
            kernel, scale = self.reverse_embeddings, self.reverse_embeddings_scale
        if _is_single_row(inputs):
            return _product(inputs, kernel, scale)
        logits = in_two_rows(partial(super().quantized_call, reverse=True), inputs)
        return _as_if(logits, inputs, ops.convert_to_tensor(kernel), ops.convert_to_tensor(scale))


def _is_single_row(x: Any) -> bool:
    return None not in x.shape and math.prod(x.shape[:-1]) == 1


def _product(x: Any, kernel: Any, scale: Any) -> Any:
    """Returns `x @ (kernel / scale)` of an int8 matrix, with nothing rounded but the matrix."""
    return ops.divide(ops.matmul(x, ops.cast(kernel, x.dtype)), ops.cast(scale, x.dtype))


def _around_embedding(call: Callable[..., Any], inputs: Any, reverse: bool = False) -> Any:
    return in_two_rows(partial(call, reverse=True), inputs) if reverse else call(inputs)


@ops.custom_gradient
def _as_if(result: Any, inputs: Any, kernel: Any, scale: Any) -> Any:
    """Returns the result, with the gradient of `inputs @ (kernel / scale)` for the inputs."""

    def gradient(*args: Any, upstream: Any = None) -> Any:
        upstream = args[0] if upstream is None else upstream
        back = ops.matmul(upstream / ops.cast(scale, upstream.dtype), _cast_like(kernel, upstream))
        return ops.zeros_like(upstream), back, None, None

    return result, gradient


def _cast_like(kernel: Any, x: Any) -> Any:
    return ops.transpose(ops.cast(kernel, x.dtype))


def quantize(model: Any, mode: str = "int8", where: Where | None = None) -> Any:
    """Returns a model with quantised matrices; what is not quantised is shared with the original.

    Quantised weights do not train. Adapters can be attached on top, and merging those gives the
    layers they are on back in the original precision.

    Args:
        model: A functional model without adapters. It stays as it is.
        mode: `"int8"`.
        where: Which layers, as for `flm.select`. Defaults to all that can be.

    Raises:
        ValueError: At another mode, or if no layer can be quantised, or one is already, or
            computes in float16, or the model has adapters.
    """
    if mode != "int8":
        raise ValueError(f"Expected mode 'int8'. Received: {mode!r}.")
    found = dict(walk(model)) if where is None else select(model, where)
    layers = {path: layer for path, layer in found.items() if isinstance(layer, _LAYERS)}
    if adapted := [path for path, layer in walk(model) if hasattr(layer, "adapter_weights")]:
        raise ValueError(
            f"Expected a model without adapters. Received one with adapters at "
            f"{', '.join(adapted[:8])}: quantise first and attach them then, or merge them."
        )
    done = [path for path, layer in layers.items() if layer.quantization_mode is not None]
    if done or not layers:
        raise ValueError(
            "Expected Dense layers and embeddings that are not quantised yet. Received: "
            f"{', '.join((done or list(found))[:8])}."
        )
    if half := [path for path, layer in layers.items() if layer.compute_dtype == "float16"]:
        raise ValueError(
            f"Expected layers that compute in float32 or bfloat16: scales of int8 leave the range "
            f"of float16. Received float16 at {', '.join(half[:8])}: load the model in another "
            "dtype."
        )
    return rewire(model, _quantized, where=lambda _, path: path in layers)


def quantized_paths(model: Any, origin: Callable[[Any], Any] = lambda layer: layer) -> list[str]:
    """Returns the paths of the layers that are quantised.

    Args:
        model: A functional model.
        origin: What to look at for a layer, if not the layer itself.
    """
    return [p for p, x in walk(model) if getattr(origin(x), "quantization_mode", None) == "int8"]


def without_values(model: Any, paths: Collection[str]) -> Any:
    """Returns the model with quantised layers at these paths, whose values are yet to come."""
    return rewire(model, _empty, where=lambda _, path: path in paths) if paths else model


def _quantized(layer: Any, path: str) -> Any:
    """By hand: `layer.quantize` collects garbage each time, and takes ten times as long."""
    new = _empty(layer, path)
    values = {variable.name: variable for variable in layer.weights}
    for variable in new.weights:
        original = values.get(variable.name)
        if original is None:  # a scale, found with its matrix
            continue
        if variable.dtype != "int8":
            variable.assign(ops.copy(original))  # training one would delete the other's array
            continue
        axis = -1 if variable.name == "embeddings" else 0
        value, scale = keras.quantizers.abs_max_quantize(original, axis=axis, to_numpy=True)
        variable.assign(value)
        scales = (x for x in new.weights if x.name == f"{variable.name}_scale")
        next(scales).assign(ops.squeeze(scale, axis))
    return new


def _empty(layer: Any, path: str) -> Any:
    config = {**layer.get_config(), "dtype": f"int8_from_{layer.dtype_policy.name}"}
    new = type(layer).from_config(config)
    with uninitialized():
        new.build_from_config(layer.get_build_config())
    return _refined(new)


def _refined(layer: Any) -> Any:
    """Makes a stock layer one of the classes above; one row for what is not linear."""
    if type(layer) is keras.layers.ReversibleEmbedding and layer.logit_soft_cap is None:
        layer.__class__ = QuantizedReversibleEmbedding
    if type(layer) is keras.layers.Dense and layer.activation is keras.activations.linear:
        layer.__class__ = QuantizedDense
    return layer


register_lowering(QuantizedDense, keras.layers.Dense, in_two_rows)
register_lowering(QuantizedReversibleEmbedding, keras.layers.ReversibleEmbedding, _around_embedding)
