"""Dense, EinsumDense and Embedding seen as one thing: a matrix (in, out) and a bias (out)."""

import math
from collections.abc import Callable

import keras
from keras import ops

from functional_llm.edits.quantized_layers import dequantized
from functional_llm.graph.types import Layer, Nested, Tensor
from functional_llm.layers.experts import ExpertDense, multiply_rows

LINEAR_LAYERS = (keras.layers.Dense, keras.layers.EinsumDense)
MATRIX_LAYERS = (*LINEAR_LAYERS, keras.layers.Embedding)


def view(layer: Layer, reverse: bool = False) -> "Linear":
    """Returns the view of a built layer.

    Args:
        layer: A Dense, EinsumDense or Embedding.
        reverse: For an embedding that is the head, too: whether it is seen as the head.

    Raises:
        TypeError: If it is another layer.
        ValueError: If an EinsumDense computes something else than a product with one matrix.
    """
    if isinstance(layer, keras.layers.Embedding):
        return TiedHead(layer) if reverse else Lookup(layer)
    return ExpertLinear(layer) if isinstance(layer, ExpertDense) else Linear(layer)


class Linear:
    """A view of a built Dense or EinsumDense.

    Args:
        layer: The layer.

    Raises:
        TypeError: If it is another layer.
        ValueError: If an EinsumDense computes something else than a product with one matrix.
    """

    takes_integers = False  # whether its inputs choose rows of the matrix
    stack: tuple[
        int, ...
    ] = ()  # of an expert layer, (E,): what else its matrices' shapes begin with

    def __init__(self, layer: Layer) -> None:
        if not isinstance(layer, LINEAR_LAYERS):
            raise TypeError(
                f"Expected a Dense or EinsumDense, received {type(layer).__name__} '{layer.name}'."
            )
        self.layer = layer
        self._axes = _kernel_axes(layer)
        num_inputs, order = self._axes
        shape = [layer.kernel.shape[axis] for axis in order]
        self._shape = shape
        self.in_size, self.out_size = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
        self._out_shape = tuple(shape[num_inputs:])

    def kernel(self) -> Tensor:
        """Returns the matrix (in, out), float32."""
        kernel = ops.cast(dequantized(self.layer, "kernel"), "float32")
        return ops.reshape(ops.transpose(kernel, self._axes[1]), (self.in_size, self.out_size))

    def bias(self) -> Tensor | None:
        """Returns the bias (out), float32; `None` if there is none."""
        bias = self.layer.bias
        if bias is None:
            return None
        full = ops.broadcast_to(ops.cast(bias, "float32"), self._out_shape)
        return ops.reshape(full, (self.out_size,))

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Returns what the layer would return with another matrix (in, out) and no bias."""
        if isinstance(self.layer, keras.layers.EinsumDense):
            return ops.einsum(self.layer.equation, x, self.as_kernel(matrix))
        return ops.matmul(x, matrix)

    def apply_factors(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Returns `apply` of the product of two matrices, the thin one first if that is cheaper."""
        if isinstance(self.layer, keras.layers.EinsumDense):
            return self.apply(x, ops.matmul(left, right))
        return ops.matmul(self.apply(x, left), right)

    def prepare(self, x: Tensor, dtype: str) -> Tensor:
        """Returns the layer's input in the dtype in which changes are computed."""
        return x if self.takes_integers else self.on_values(x, lambda v: ops.cast(v, dtype))

    def on_values(self, x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the layer's input with its numbers changed by a function."""
        return fn(x)

    def product(self, x: Tensor) -> Tensor:
        """Returns what the layer returns, without the bias."""
        return self.apply(x, self.kernel())

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (in, out) in the shape of the layer's kernel."""
        order = self._axes[1]
        return ops.transpose(ops.reshape(matrix, self._shape), _inverse(order))

    def as_output(self, vector: Tensor) -> Tensor:
        """Returns a vector (out) in the shape of the last axes of the layer's output."""
        return ops.reshape(vector, self._out_shape)

    def as_input(self, vector: Tensor) -> Tensor:
        """Returns a vector (in) in the shape of the last axes of the layer's input."""
        return ops.reshape(vector, tuple(self._shape[: self._axes[0]]))

    def make_layer(
        self, kernel: Tensor, bias: Tensor | None, activation: Callable[..., Tensor]
    ) -> Layer:
        """Returns a layer of the same class and config with other weights.

        Args:
            kernel: (in, out), float32.
            bias: (out), float32, or `None`.
            activation: The layer's activation.
        """
        config = self.layer.get_config()
        if self.layer.quantization_mode is not None:  # integers would round small changes away
            config["dtype"] = self.layer.dtype_policy.name.rpartition("_from_")[2]
        if bias is not None and isinstance(self.layer, keras.layers.Dense):
            config["use_bias"] = True
        elif bias is not None and self.layer.bias is None:
            config["bias_axes"] = _output_letters(self.layer)
        config["activation"] = keras.activations.serialize(activation)
        new = type(self.layer).from_config(config)
        new.build_from_config(self.layer.get_build_config())
        # Copies: training donates a variable's array, which another variable must not hold.
        new.kernel.assign(ops.copy(self.as_kernel(kernel)))
        if bias is not None:
            if math.prod(new.bias.shape) != math.prod(bias.shape):
                raise ValueError(
                    f"The bias of '{self.layer.name}' has shape {tuple(new.bias.shape)}, and the "
                    f"change to it {self.out_size} numbers. Expected a bias over all output axes."
                )
            new.bias.assign(ops.copy(ops.reshape(bias, new.bias.shape)))
        return new


class ExpertLinear(Linear):
    """A view of an `ExpertDense`: matrices (E, in, out), biases (E, out), inputs with routing."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.stack = (layer.num_experts,)
        self.in_size, self.out_size = layer.kernel.shape[1:]

    def kernel(self) -> Tensor:
        """Returns the matrices (E, in, out), float32."""
        kernel = ops.cast(self.layer.kernel, "float32")
        if self.layer.quantization_mode != "int8":
            return kernel
        scale = ops.cast(self.layer.kernel_scale, "float32")
        return kernel / ops.reshape(scale, (*self.stack, 1, self.out_size))

    def bias(self) -> Tensor | None:
        """Returns the biases (E, out), float32; `None` if there are none."""
        return None if self.layer.bias is None else ops.cast(self.layer.bias, "float32")

    def apply(self, x: Nested, matrix: Tensor) -> Tensor:
        """Returns what the layer would return with other matrices (E, in, out) and no bias."""
        return multiply_rows(x, matrix)

    def apply_factors(self, x: Nested, left: Tensor, right: Tensor) -> Tensor:
        """Returns `apply` of the products of two matrices for each expert."""
        return multiply_rows({**x, "x": multiply_rows(x, left)}, right)

    def on_values(self, x: Nested, fn: Callable[[Tensor], Tensor]) -> Nested:
        """Returns the layer's input with its rows changed by a function."""
        return {**x, "x": fn(x["x"])}

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """Returns matrices (E, in, out) in the shape of the layer's kernel."""
        return matrix


class Lookup(Linear):
    """A view of an Embedding: a matrix (tokens, out), of which integers choose rows."""

    takes_integers = True

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.in_size, self.out_size = layer.input_dim, layer.output_dim

    def kernel(self) -> Tensor:
        """Returns the matrix (in, out), float32."""
        return ops.cast(dequantized(self.layer, "embeddings"), "float32")

    def bias(self) -> None:
        """An embedding has none."""
        return None

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Returns what the layer would return with another matrix."""
        return ops.take(matrix, x, axis=0)

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (in, out) in the shape of the layer's."""
        return matrix

    def as_output(self, vector: Tensor) -> Tensor:
        """Returns a vector (out) in the shape of the last axis of the layer's output."""
        return vector


class TiedHead(Lookup):
    """A view of an embedding that is the head, too: a matrix (in, tokens)."""

    takes_integers = False

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.in_size, self.out_size = self.out_size, self.in_size

    def kernel(self) -> Tensor:
        """Returns the matrix (in, out), float32."""
        return ops.transpose(super().kernel())

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Returns what the layer would return with another matrix."""
        return ops.matmul(x, matrix)

    def as_input(self, vector: Tensor) -> Tensor:
        """Returns a vector (in) in the shape of the last axis of the layer's input."""
        return vector


def _kernel_axes(layer: Layer) -> tuple[int, list[int]]:
    """Returns the number of input axes of a kernel, and the order of axes that puts them first."""
    if isinstance(layer, keras.layers.Dense):
        return 1, [0, 1]
    inputs, kernel, outputs = _letters(layer)
    contracted = [x for x in inputs if x in kernel and x not in outputs]
    free = [x for x in outputs if x in kernel and x not in inputs]
    is_trailing = inputs.endswith("".join(contracted)) and outputs.endswith("".join(free))
    if len(contracted) + len(free) != len(kernel) or not is_trailing:
        raise ValueError(
            f"EinsumDense '{layer.name}' with the equation '{layer.equation}' is no product with "
            "one matrix: expected the last axes of the input to become the last of the output."
        )
    return len(contracted), [kernel.index(x) for x in contracted + free]


def _letters(layer: Layer) -> tuple[str, str, str]:
    left, outputs = layer.equation.replace(" ", "").replace("...", "").split("->")
    inputs, kernel = left.split(",")
    return inputs, kernel, outputs


def _output_letters(layer: Layer) -> str:
    inputs, _, outputs = _letters(layer)
    return "".join(x for x in outputs if x not in inputs)


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
