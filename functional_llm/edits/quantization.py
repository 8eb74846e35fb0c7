"""Quantising: a model whose matrices are int8, as a rewiring.

Stock Dense layers and embeddings can hold int8, with one scale for each output channel, by which
the output is divided. Everything else stays in the model's own precision, the inputs too: some
inputs of language models are far larger than the rest, and beside those, int8 rounds the rest away
(a perplexity of 82.5 rose by 3.5; with int8 in the matrices alone, by 0.3).

On CPUs with instructions for it, several rows of inputs are rounded to bfloat16: see `Int8AsHalf`.
"""

from collections.abc import Callable, Collection

import keras
from keras import ops

from functional_llm.graph.backend import require_jax
from functional_llm.graph.keras_private import quantized_embeddings
from functional_llm.graph.keras_values import uninitialized
from functional_llm.graph.rewiring import rewire
from functional_llm.graph.selection import Where, select, walk
from functional_llm.graph.types import Layer, Tensor
from functional_llm.layers.experts import ExpertDense, ExpertScores
from functional_llm.stock.lowering import register_lowering

_QUANTIZABLE = (keras.layers.Dense, keras.layers.Embedding, ExpertDense)


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedDense(keras.layers.Dense):
    """Keras's Dense, except that it multiplies float32 by int8 as `_int8_product` does."""

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.lora_enabled:
            return super().quantized_call(inputs)
        outputs = _int8_product(inputs, self.kernel, self.kernel_scale)
        outputs = outputs if self.bias is None else ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


@keras.saving.register_keras_serializable("functional_llm")
class QuantizedReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Keras's ReversibleEmbedding, with the same exception when it is the head."""

    def quantized_call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        if not reverse:
            return super().quantized_call(inputs)
        if self.tie_weights:
            kernel = ops.transpose(quantized_embeddings(self))
            logits = _int8_product(inputs, kernel, self.embeddings_scale)
        else:
            logits = _int8_product(inputs, self.reverse_embeddings, self.reverse_embeddings_scale)
        cap = self.logit_soft_cap
        return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)


def _int8_product(x: Tensor, kernel: Tensor, scale: Tensor) -> Tensor:
    """Returns `x @ (kernel / scale)` of an int8 matrix.

    Keras multiplies by int8 without a cast, which strict dtype promotion in JAX refuses; and for
    the gradient, Keras divides the whole matrix by its scale.
    """
    return ops.divide(ops.matmul(x, ops.cast(kernel, x.dtype)), ops.cast(scale, x.dtype))


_QUANTIZED_CLASSES = {
    keras.layers.Dense: QuantizedDense,
    keras.layers.ReversibleEmbedding: QuantizedReversibleEmbedding,
}


def quantize(model: keras.Model, mode: str = "int8", where: Where | None = None) -> keras.Model:
    """Returns a model with quantised matrices; what is not quantised is shared with the original.

    Only weights are quantised: each output channel becomes `round(column * scale)` with
    `scale = 127 / max(abs(column))` (absmax quantisation, section 2 of
    [LLM.int8()](https://arxiv.org/abs/2208.07339)). A stock file of the model multiplies float32 by
    int8, which JAX refuses if `jax_numpy_dtype_promotion` is "strict".

    Quantised weights do not train. Adapters can be attached on top; merging them turns the layers
    under them back to the original precision.

    Args:
        model: A functional model without adapters. It stays as it is.
        mode: `"int8"`.
        where: Which layers, as for `flm.select`. Defaults to all that can be.

    Raises:
        RuntimeError: With another backend than JAX.
        ValueError: At another mode, or if no layer can be quantised, or a layer is quantised
            already or computes in float16, or the model has adapters.
    """
    require_jax("flm.quantize")
    if mode != "int8":
        raise ValueError(f"Expected mode 'int8'. Received: {mode!r}.")
    found = dict(walk(model)) if where is None else select(model, where)
    layers = {path: layer for path, layer in found.items() if _is_quantizable(layer)}
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
    return rewire(model, _quantize_layer, where=lambda _, path: path in layers)


def quantized_paths(
    model: keras.Model, origin: Callable[[Layer], Layer] = lambda layer: layer
) -> list[str]:
    """Returns the paths of the layers that are quantised.

    Args:
        model: A functional model.
        origin: `origin(layer)` is the layer to look at in the place of `layer`.
    """
    return [p for p, x in walk(model) if getattr(origin(x), "quantization_mode", None) == "int8"]


def with_uninitialized_int8(model: keras.Model, paths: Collection[str]) -> keras.Model:
    """Returns the model with int8 layers at these paths, whose weights are still to be loaded."""
    if not paths:
        return model
    return rewire(model, _uninitialized_int8, where=lambda _, path: path in paths)


def _is_quantizable(layer: Layer) -> bool:
    return isinstance(layer, _QUANTIZABLE) and not isinstance(layer, ExpertScores)


def _quantize_layer(layer: Layer, path: str) -> Layer:
    """Keras's `layer.quantize` collects garbage at each call, and takes ten times as long."""
    new = _uninitialized_int8(layer, path)
    values = {variable.name: variable for variable in layer.weights}
    for variable in new.weights:
        original = values.get(variable.name)
        if original is None:  # a scale, which is set with its matrix
            continue
        if variable.dtype != "int8":
            variable.assign(ops.copy(original))  # training one would delete the other's array
            continue
        axis = -1 if variable.name == "embeddings" else -2
        value, scale = keras.quantizers.abs_max_quantize(original, axis=axis, to_numpy=True)
        variable.assign(value)
        scales = (x for x in new.weights if x.name == f"{variable.name}_scale")
        scale_of = next(scales)
        scale_of.assign(ops.reshape(scale, scale_of.shape))
    return new


def _uninitialized_int8(layer: Layer, path: str) -> Layer:
    """Returns an int8 layer like this one, without values."""
    weights_only = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    config = {
        **layer.get_config(),
        "dtype": f"int8_from_{layer.dtype_policy.name}",
        "quantization_config": keras.saving.serialize_keras_object(weights_only),
    }
    new = type(layer).from_config(config)
    with uninitialized():
        new.build_from_config(layer.get_build_config())
    # A user's subclass keeps its class: it may compute something else.
    new.__class__ = _QUANTIZED_CLASSES.get(type(new), type(new))
    return new


register_lowering(QuantizedDense, keras.layers.Dense)
register_lowering(QuantizedReversibleEmbedding, keras.layers.ReversibleEmbedding)
