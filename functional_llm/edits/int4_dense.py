"""A Dense of 4-bit integers, with a scale and an offset for each group of inputs to an output.

Stock Keras has the scale, and in the place of the offset an integer, which is a quarter of a step
off in the mean: too much for a small model, and for a file in which the offset is a float. So there
are two stock layers in a stock file: Keras's own int4 Dense, and a Dense for the sums of groups.

Shapes: B batch, T tokens, K inputs, N outputs, M bytes for N outputs, R groups.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.graph.keras_private import quantized_matrix, set_packed_kernel
from functional_llm.graph.keras_values import has_value, uninitialized
from functional_llm.graph.types import JSON, Layer, Tensor
from functional_llm.kernels.int4 import dequantize_int4, multiply_int4
from functional_llm.stock.lowering import register_lowering
from functional_llm.stock.several_layers import StockLayers

_LEAST = -8  # the integer of a group's least number, which is the offset


def int4_config(layer: Layer, size: int) -> JSON:
    """Returns the config of a layer that holds int4 in groups of `size` inputs."""
    config = keras.quantizers.Int4QuantizationConfig(block_size=size)
    return {
        **layer.get_config(),
        "dtype": f"int4/{size}_from_{layer.dtype_policy.name.rpartition('_from_')[2]}",
        "quantization_config": keras.saving.serialize_keras_object(config),
    }


@keras.saving.register_keras_serializable("functional_llm")
class Int4Dense(keras.layers.Dense):
    """Keras's Dense of int4, except that `kernel_offset` is there in the place of `kernel_zero`.

    A number is `kernel_scale * (integer + 8) + kernel_offset`. Scales and offsets are float16,
    whatever the model's precision: that is what files have, and 5 bits a number in groups of 32.
    """

    def quantized_build(self, kernel_shape: tuple[int, int], mode: str, config: object) -> None:
        """Makes the weights.

        Args:
            kernel_shape: (K, N).
            mode: `"int4"`.
            config: With the size of the groups, which divides K.
        """
        num_inputs, units = kernel_shape
        shape = num_inputs, -(-units // 2)
        packed = self.add_weight(name="kernel", shape=shape, dtype="int8", trainable=False)
        set_packed_kernel(self, packed, kernel_shape)
        groups = num_inputs // self.dtype_policy.block_size, units
        self.kernel_scale, self.kernel_offset = (
            self.add_weight(
                name=name, shape=groups, dtype="float16", trainable=False, autocast=False
            )
            for name in ("kernel_scale", "kernel_offset")
        )

    @property
    def variable_serialization_spec(self) -> dict[str, list[str]]:
        """What Keras's weight files have of the layer, in order."""
        return {"int4": ["kernel", "bias", "kernel_scale", "kernel_offset"]}

    def quantized_call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        outputs = multiply_int4(inputs, *int4_parts(self))
        outputs = outputs if self.bias is None else ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def product_matrix(self) -> Tensor | None:
        """Returns the matrix (in, out), float32; `None` if that is not all: see `layers.latent`."""
        is_linear = self.activation is keras.activations.linear and self.bias is None
        return dequantize_int4(*int4_parts(self)) if is_linear else None


def int4_parts(layer: Layer) -> list[Tensor]:
    """Returns the packed integers (K, M), the scales and the offsets (R, N) of a layer."""
    integers = quantized_matrix(layer)
    if isinstance(layer, Int4Dense):
        parts = [integers, layer.kernel_scale, layer.kernel_offset]
    else:  # a user's own Dense, as stock Keras has it
        scale, zero = (ops.cast(x, "float32") for x in (layer.kernel_scale, layer.kernel_zero))
        parts = [integers, scale, (_LEAST - zero) * scale]
    return [ops.convert_to_tensor(x) for x in parts]


class _InStockLayers:
    """What stands for an `Int4Dense` in a stock graph: two layers, called as one.

    Args:
        layer: The layer.
        name: Of the stock int4 Dense.
    """

    def __init__(self, layer: Int4Dense, name: str) -> None:
        self._layer = layer
        size, self._groups = layer.dtype_policy.block_size, layer.kernel_scale.shape[0]
        config = {**int4_config(layer, size), "name": name, "activation": None}
        if config["dtype"].endswith("_from_bfloat16"):  # whose scales would lose digits
            config["dtype"] = f"int4/{size}_from_mixed_bfloat16"
        self._steps = keras.layers.Dense.from_config(config)
        self._offsets = keras.layers.Dense(
            layer.units, use_bias=False, dtype="float32", trainable=False, name=f"{name}_offsets"
        )
        self.layers = self._steps, self._offsets
        with uninitialized():
            self._steps.build_from_config(layer.get_build_config())
            self._offsets.build((None, self._groups))
        self.bias = self._steps.bias
        self._steps.g_idx.assign(np.arange(self._groups * size) // size)
        self._steps.kernel_zero.assign(np.full(self._steps.kernel_zero.shape, _LEAST))
        pairs = [
            (quantized_matrix(layer), quantized_matrix(self._steps)),
            (layer.kernel_scale, self._steps.kernel_scale),
            (layer.kernel_offset, self._offsets.kernel),
            (layer.bias, self.bias),
        ]
        self.copies = [(own, stock) for own, stock in pairs if own is not None]
        for own, stock in self.copies:
            if has_value(own):  # else a file gives one to the stock layer
                stock.assign(own.value)

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output."""
        between = (-1, *x.shape[2:-1]) if len(x.shape) > 2 else ()
        groups = keras.layers.Reshape((*between, self._groups, x.shape[-1] // self._groups))(x)
        outputs = ops.add(self._steps(x), self._offsets(ops.sum(groups, axis=-1)))
        if outputs.dtype != self._layer.compute_dtype:
            outputs = ops.cast(outputs, self._layer.compute_dtype)
        activation = self._layer.activation
        is_linear = activation is None or activation is keras.activations.linear
        return outputs if is_linear else keras.layers.Activation(activation)(outputs)


register_lowering(Int4Dense, StockLayers(_InStockLayers))
