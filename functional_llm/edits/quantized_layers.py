"""Dense layers and embeddings of integers: stock ones, except for how they multiply.

They hold what stock layers hold, and stand as stock layers in stock files. Keras multiplies float32
by int8 without a cast, which strict dtype promotion in JAX refuses; for the gradient it divides
the whole matrix by its scale; and it unpacks a whole table of int4 to look one row up.
"""

import keras
import numpy as np
from keras import ops

from functional_llm.edits.int4_dense import Int4Dense, int4_config, int4_parts
from functional_llm.edits.rounding import (
    round_to_int4,
    round_to_int4_with_zeros,
    round_to_int8,
)
from functional_llm.formats.grid import SIZE, Grid
from functional_llm.graph.keras_private import quantized_matrix
from functional_llm.graph.keras_values import uninitialized
from functional_llm.graph.placing import assign
from functional_llm.graph.types import Layer, Tensor
from functional_llm.kernels.int4 import dequantize_int4, look_up_int4
from functional_llm.layers.experts import ExpertDense
from functional_llm.stock.lowering import register_lowering


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedDense(keras.layers.Dense):
    """Keras's Dense of int8, except that it multiplies as `_int8_product`."""

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.lora_enabled:
            return super().quantized_call(inputs)
        outputs = _int8_product(inputs, self.kernel, self.kernel_scale)
        outputs = outputs if self.bias is None else ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def product_matrix(self) -> Tensor | None:
        """Returns the matrix (in, out), float32; `None` if that is not all: see `layers.latent`."""
        is_linear = self.activation is keras.activations.linear and self.bias is None
        return dequantized(self, "kernel") if is_linear and not self.lora_enabled else None


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedEmbedding(keras.layers.Embedding):
    """Keras's Embedding, except that it unpacks only the rows that are looked up."""

    def quantized_call(self, inputs: Tensor) -> Tensor:
        if self.quantization_mode != "int4" or self.lora_enabled:
            return super().quantized_call(inputs)
        return ops.cast(look_up_int4(ops.cast(inputs, "int32"), *_parts(self)), self.compute_dtype)


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Keras's ReversibleEmbedding, with the same exceptions."""

    def quantized_call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        is_int4 = self.quantization_mode == "int4"
        if self.lora_enabled or not (reverse or is_int4):
            return super().quantized_call(inputs, reverse=reverse)
        if not reverse:
            inputs = ops.cast(inputs, "int32")
            return ops.cast(look_up_int4(inputs, *_parts(self)), self.compute_dtype)
        if is_int4:
            table = dequantized(self, "embeddings" if self.tie_weights else "reverse_embeddings")
            kernel = ops.transpose(table) if self.tie_weights else table
            logits = ops.matmul(inputs, ops.cast(kernel, inputs.dtype))
        elif self.tie_weights:
            kernel = ops.transpose(quantized_matrix(self))
            logits = _int8_product(inputs, kernel, self.embeddings_scale)
        else:
            logits = _int8_product(inputs, self.reverse_embeddings, self.reverse_embeddings_scale)
        cap = self.logit_soft_cap
        return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)


_CLASSES = {
    keras.layers.Dense: QuantizedDense,
    keras.layers.Embedding: QuantizedEmbedding,
    keras.layers.ReversibleEmbedding: QuantizedReversibleEmbedding,
}
QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding, ExpertDense)
MATRICES = ("kernel", "embeddings", "reverse_embeddings")


def _int8_product(x: Tensor, kernel: Tensor, scale: Tensor) -> Tensor:
    """Returns `x @ (kernel / scale)` of an int8 matrix."""
    return ops.divide(ops.matmul(x, ops.cast(kernel, x.dtype)), ops.cast(scale, x.dtype))


def mode_of(layer: Layer) -> str | None:
    """Returns how a layer is quantised: "int8", or "int4/32" with 32 inputs in a group."""
    mode = getattr(layer, "quantization_mode", None)
    return f"int4/{layer.dtype_policy.block_size}" if mode == "int4" else mode


def make_uninitialized(layer: Layer, mode: str) -> Layer:
    """Returns a quantised layer like this one, without values: `set_matrix` gives it some."""
    size = group_size(mode)
    if size:
        config = int4_config(layer, size)
    else:
        int8 = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
        config = {
            **layer.get_config(),
            "dtype": f"{mode}_from_{layer.dtype_policy.name}",
            "quantization_config": keras.saving.serialize_keras_object(int8),
        }
    is_dense = type(layer) is keras.layers.Dense
    new = (Int4Dense if size and is_dense else type(layer)).from_config(config)
    with uninitialized():
        new.build_from_config(layer.get_build_config())
    if hasattr(new, "g_idx"):
        new.g_idx.assign(np.arange(new.g_idx.shape[0]) // size)
    # A user's subclass keeps its class: it may compute something else.
    new.__class__ = _CLASSES.get(type(new), type(new))
    return new


def takes_grids(layer: Layer) -> bool:
    """Whether `set_matrix` takes a `Grid` as a file has it, too."""
    return isinstance(layer, Int4Dense) and layer.dtype_policy.block_size == SIZE


def set_matrix(layer: Layer, name: str, value: np.ndarray | Grid) -> None:
    """Rounds a matrix to what a quantised layer holds in its place.

    Args:
        layer: From `make_uninitialized`.
        name: Of the weight, one of `MATRICES`.
        value: Its value, in its shape before it was quantised; a grid stays as it is.
    """
    parts = _rounded(layer, name, value)
    variables = {variable.name: variable for variable in layer.weights}
    for suffix, part in parts.items():
        variable = variables[name + suffix]
        assign(variable, np.reshape(part, variable.shape))


def _rounded(layer: Layer, name: str, value: np.ndarray | Grid) -> dict[str, np.ndarray]:
    """Returns what a layer's variables hold of a matrix: end of a variable's name -> value."""
    size = group_size(str(mode_of(layer)))
    if isinstance(layer, Int4Dense) or isinstance(value, Grid):
        grid = value if isinstance(value, Grid) else round_to_int4(value, size)
        if not np.isfinite(grid.offset).all():
            raise ValueError(
                f"Expected numbers within the range of float16, in which int4 has its scales. "
                f"Received others in '{layer.name}'."
            )
        return {"": _packed(grid.integers, -1), "_scale": grid.scale, "_offset": grid.offset}
    if value.ndim == 3:  # of experts
        stacks = zip(*(round_to_int8(matrix) for matrix in value), strict=True)
        return dict(zip(("", "_scale"), map(np.stack, stacks), strict=True))
    is_table = name == "embeddings"
    matrix_KN = value.T if is_table else value
    found = round_to_int4_with_zeros(matrix_KN, size) if size else round_to_int8(matrix_KN)
    names = ("", "_scale", "_zero")[: len(found)]
    parts = dict(zip(names, (x.T if is_table else x for x in found), strict=True))
    if size:
        parts[""] = _packed(parts[""], 0 if name == "reverse_embeddings" else -1)
    return parts


def _packed(integers: np.ndarray, axis: int) -> np.ndarray:
    packed: np.ndarray = keras.quantizers.pack_int4(np.ascontiguousarray(integers), axis=axis)[0]
    return packed


def dequantized(layer: Layer, name: str) -> Tensor:
    """Returns one of the `MATRICES` of a layer in floats: float32, if it is quantised."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is None:
        return getattr(layer, name)
    if mode == "int4" and name == "kernel":
        return dequantize_int4(*int4_parts(layer))
    integers, scale, *zeros = _parts(layer, name)
    scale = ops.cast(scale, "float32")
    if mode == "int8":
        scale = ops.expand_dims(scale, 1) if name == "embeddings" else scale
        return ops.cast(integers, "float32") / scale
    parts = [integers, scale, ops.cast(zeros[0], "int8")]
    if name == "reverse_embeddings":
        parts = [ops.transpose(x) for x in parts]
    table = look_up_int4(ops.arange(layer.input_dim), *parts)
    return ops.transpose(table) if name == "reverse_embeddings" else table


def _parts(layer: Layer, name: str | None = None) -> list[Tensor]:
    """Returns the integers of a layer, their scales and, of a table of int4, their zeros."""
    name = name or ("kernel" if isinstance(layer, keras.layers.Dense) else "embeddings")
    integers = layer.reverse_embeddings if name.startswith("reverse") else quantized_matrix(layer)
    names = (f"{name}_scale", *([f"{name}_zero"] if layer.quantization_mode == "int4" else []))
    return [ops.convert_to_tensor(x) for x in (integers, *(getattr(layer, x) for x in names))]


def group_size(mode: str) -> int:
    """Returns how many inputs have a scale of their own; 0 in int8."""
    return int(mode.removeprefix("int4/")) if mode.startswith("int4/") else 0


register_lowering(QuantizedDense, keras.layers.Dense)
register_lowering(QuantizedEmbedding, keras.layers.Embedding)
register_lowering(QuantizedReversibleEmbedding, keras.layers.ReversibleEmbedding)
