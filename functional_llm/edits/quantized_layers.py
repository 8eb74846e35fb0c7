"""Dense layers and embeddings of integers: stock ones, except for how they multiply.

They hold what stock layers hold, and stand as stock layers in stock files. Keras multiplies float32
by int8 without a cast, which strict dtype promotion in JAX refuses; for the gradient it divides
the whole matrix by its scale; and it unpacks a whole table of int4 to look one row up.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.edits.rounding import round_to_int4, round_to_int8
from functional_llm.graph.keras_private import quantized_matrix
from functional_llm.graph.keras_values import uninitialized
from functional_llm.graph.placing import assign
from functional_llm.graph.types import Layer, Tensor
from functional_llm.kernels.int4 import dequantize_int4, look_up_int4, multiply_int4
from functional_llm.layers.experts import ExpertDense
from functional_llm.stock.lowering import register_lowering


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedDense(keras.layers.Dense):
    """Keras's Dense, except that it multiplies as `_int8_product` or `multiply_int4`."""

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.lora_enabled:
            return super().quantized_call(inputs)
        if self.quantization_mode == "int4":
            outputs = multiply_int4(inputs, *_parts(self))
        else:
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
    config: Any = (
        keras.quantizers.Int4QuantizationConfig(block_size=size)
        if size
        else keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    )
    new = type(layer).from_config(
        {
            **layer.get_config(),
            "dtype": f"{mode}_from_{layer.dtype_policy.name}",
            "quantization_config": keras.saving.serialize_keras_object(config),
        }
    )
    with uninitialized():
        new.build_from_config(layer.get_build_config())
    if size:
        new.g_idx.assign(np.arange(new.g_idx.shape[0]) // size)
    # A user's subclass keeps its class: it may compute something else.
    new.__class__ = _CLASSES.get(type(new), type(new))
    return new


def set_matrix(layer: Layer, name: str, value: np.ndarray) -> None:
    """Rounds a matrix to what a quantised layer holds in its place.

    Args:
        layer: From `make_uninitialized`.
        name: Of the weight, one of `MATRICES`.
        value: Its value, in its shape before it was quantised.
    """
    variables = {variable.name: variable for variable in layer.weights}
    if value.ndim == 3:  # of experts
        stacks = zip(*(round_to_int8(matrix) for matrix in value), strict=True)
        for key, stack in zip((name, f"{name}_scale"), stacks, strict=True):
            assign(variables[key], np.reshape(np.stack(stack), variables[key].shape))
        return
    matrix_KN = value.T if name == "embeddings" else value
    size = group_size(str(mode_of(layer)))
    parts: dict[str, np.ndarray] = {}
    if size:
        parts[""], parts["_scale"], parts["_zero"] = round_to_int4(matrix_KN, size)
    else:
        parts[""], parts["_scale"] = round_to_int8(matrix_KN)
    if name == "embeddings":
        parts = {key: x.T for key, x in parts.items()}
    if size:
        axis = 0 if name == "reverse_embeddings" else -1
        parts[""] = keras.quantizers.pack_int4(np.ascontiguousarray(parts[""]), axis=axis)[0]
    for suffix, part in parts.items():
        assign(variables[name + suffix], part)


def dequantized(layer: Layer, name: str) -> Tensor:
    """Returns one of the `MATRICES` of a layer in floats: float32, if it is quantised."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is None:
        return getattr(layer, name)
    integers, scale, *zeros = _parts(layer, name)
    scale = ops.cast(scale, "float32")
    if mode == "int8":
        scale = ops.expand_dims(scale, 1) if name == "embeddings" else scale
        return ops.cast(integers, "float32") / scale
    if name == "kernel":
        return dequantize_int4(integers, scale, zeros[0])
    parts = [integers, scale, ops.cast(zeros[0], "int8")]
    if name == "reverse_embeddings":
        parts = [ops.transpose(x) for x in parts]
    table = look_up_int4(ops.arange(layer.input_dim), *parts)
    return ops.transpose(table) if name == "reverse_embeddings" else table


def _parts(layer: Layer, name: str | None = None) -> list[Tensor]:
    """Returns the integers of a layer, their scales and, of int4, their zeros."""
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
