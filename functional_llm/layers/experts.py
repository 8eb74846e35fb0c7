"""Layers of experts: tokens are sent to experts, multiplied with their matrices, and summed again.

Between `ExpertDispatch` and `ExpertCombine` lie *rows*, one for each choice of a token, in an order
that suits the kernel: the dispatch has chosen it, and its description, the *routing*, goes along an
edge of the graph to all layers between. What works on the last axis, such as an activation, may
stand between them.

Shapes: B batch, T tokens, D in, F out, E experts, k experts chosen for each token. Rows are
(B, T, E, ...), all experts of each token, unless a kernel lays them otherwise.
"""

from collections.abc import Mapping
from typing import Any

import jax
import keras
from keras import ops

from functional_llm.graph.types import JSON, Nested, Tensor
from functional_llm.kernels import ExpertFacts, ExpertKernel, choose_experts, expert_kernels

PACKAGE = "functional_llm"
_PARTS = ("members", "experts", "order", "places", "begins", "ends", "kernel")


@keras.saving.register_keras_serializable(PACKAGE)
class ExpertScores(keras.layers.Dense):
    """The Dense that gives each expert a score: in float32, whatever the model's precision.

    Scores that differ by less than bfloat16 or int8 tell apart choose other experts. So `quantize`
    leaves it as it is, and "all" linear layers of an adapter are those beside it.

    Args:
        num_experts: E.
        **kwargs: Of `keras.layers.Dense`.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(num_experts, **{"dtype": "float32", **kwargs})
        self.num_experts = num_experts

    def get_config(self) -> JSON:
        config = super().get_config()
        return {"num_experts": config.pop("units"), **config}


@keras.saving.register_keras_serializable(PACKAGE)
class ExpertDispatch(keras.layers.Layer):
    """Sends tokens to their experts. Padding tokens go nowhere.

    How the rows lie, `kernels.choose_experts` decides when a program is made.

    Args:
        num_experts: E.
        kernel: The name of a kernel: an error if it cannot compute this. Defaults to the best one.
    """

    may_return_none = True  # for those parts of a routing that are absent

    def __init__(self, num_experts: int, kernel: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.kernel = kernel

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Nested]:
        """Makes rows.

        Args:
            inputs: `x` (B, T, D); `experts` (B, T, k) int32, and the `weights` (B, T, k) of each;
                `positions` (B, T) int32, -1 for padding.

        Returns:
            `x`, rows; `weights`, a number for each row, with an axis of one behind it; `routing`,
            for the layers that follow.
        """
        x_BTD = inputs["x"]
        is_token_BT1 = ops.expand_dims(inputs["positions"], 2) >= 0
        experts_BTk = ops.cast(inputs["experts"], "int32")
        experts_BTk = ops.where(is_token_BT1, experts_BTk, self.num_experts)
        kernel, _ = choose_experts(self.facts(inputs), self.kernel)
        routing = kernel.route(experts_BTk, self.num_experts)
        weights_BTk = ops.cast(inputs["weights"], x_BTD.dtype)
        return {
            "x": kernel.spread(x_BTD, routing),
            "weights": kernel.spread_choices(weights_BTk, experts_BTk, routing),
            "routing": dict.fromkeys(_PARTS) | routing | _tag(kernel),
        }

    def facts(self, inputs: Mapping[str, Tensor]) -> ExpertFacts:
        """Returns what is known of a call when its program is made.

        Args:
            inputs: As for `call`; of the tensors, shapes are read.
        """
        batch, tokens, choices = inputs["experts"].shape
        is_jax = keras.backend.backend() == "jax"
        known = is_jax and not isinstance(inputs["x"], keras.KerasTensor)
        return ExpertFacts(
            platform=jax.default_backend() if known else "other",
            tokens=batch * tokens if known else 0,
            choices=choices,
            experts=self.num_experts,
        )

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, Nested]:
        x, experts = inputs["x"], self.num_experts
        batch, tokens, width = x.shape

        def spec(*shape: int | None, dtype: str = "int32") -> keras.KerasTensor:
            return keras.KerasTensor(shape, dtype=dtype)

        routing = {
            "members": spec(batch, tokens, experts, dtype="bool"),
            "experts": spec(None),
            "order": spec(None),
            "places": spec(batch, tokens, None),
            "begins": spec(experts),
            "ends": spec(experts),
            "kernel": spec(0, None),
        }
        dtype = self.compute_dtype
        return {
            "x": spec(batch, tokens, experts, width, dtype=dtype),
            "weights": spec(batch, tokens, experts, 1, dtype=dtype),
            "routing": routing,
        }

    def get_config(self) -> JSON:
        return {**super().get_config(), "num_experts": self.num_experts, "kernel": self.kernel}


@keras.saving.register_keras_serializable(PACKAGE)
class ExpertDense(keras.layers.EinsumDense):
    """A Dense for each expert: a row is multiplied with the matrix of its own.

    What it computes is what a stock EinsumDense computes of the rows of all experts. The kernel is
    (E, D, F), the bias (E, F).

    Args:
        num_experts: E.
        units: F.
        use_bias: Whether there is a bias.
        **kwargs: Of `keras.layers.EinsumDense`.
    """

    def __init__(self, num_experts: int, units: int, use_bias: bool = False, **kwargs: Any) -> None:
        bias_axes = "ef" if use_bias else None
        shape = (None, num_experts, units)
        super().__init__("bted,edf->btef", shape, bias_axes=bias_axes, **kwargs)
        self.num_experts = num_experts
        self.units = units
        self.use_bias = use_bias

    def build(self, input_shape: Nested) -> None:
        x = input_shape["x"] if isinstance(input_shape, Mapping) else input_shape
        super().build((None, None, self.num_experts, x[-1]))
        self.input_spec = None  # rows have the shape that suits the kernel

    def get_build_config(self) -> JSON:
        """Returns the shape that the stock layer would be built with."""
        return {"input_shape": (None, None, self.num_experts, self.kernel.shape[1])}

    def call(self, inputs: Mapping[str, Nested], training: bool | None = None) -> Tensor:
        """Multiplies.

        Args:
            inputs: `x`, rows of D numbers, and the `routing` of an `ExpertDispatch`.

        Returns:
            Rows of F numbers.
        """
        return self._finish(multiply_rows(inputs, self.kernel), inputs)

    def quantized_call(self, inputs: Mapping[str, Nested], training: bool | None = None) -> Tensor:
        """The same with a kernel of int8, which is divided by a scale for each output."""
        scale_EF = ops.reshape(self.kernel_scale, (self.num_experts, self.units))
        x = multiply_rows(inputs, self.kernel)
        x = ops.divide(x, ops.cast(values_of_rows(inputs, scale_EF), x.dtype))
        return self._finish(x, inputs)

    def _finish(self, x: Tensor, inputs: Mapping[str, Nested]) -> Tensor:
        if self.bias is not None:
            x = ops.add(x, values_of_rows(inputs, self.bias))
        return x if self.activation is None else self.activation(x)

    def compute_output_spec(
        self, inputs: Mapping[str, Nested], training: bool | None = None
    ) -> keras.KerasTensor:
        return keras.KerasTensor((*inputs["x"].shape[:-1], self.units), self.compute_dtype)

    def get_config(self) -> JSON:
        config = super().get_config()
        for name in ("equation", "output_shape", "bias_axes"):
            config.pop(name)
        own = {"num_experts": self.num_experts, "units": self.units, "use_bias": self.use_bias}
        return {**config, **own}


@keras.saving.register_keras_serializable(PACKAGE)
class ExpertCombine(keras.layers.Layer):
    """Sums the rows of each token; a padding token has none, and gets zeros."""

    def call(self, inputs: Mapping[str, Nested]) -> Tensor:
        """Sums.

        Args:
            inputs: `x`, rows of D numbers, and the `routing` of an `ExpertDispatch`.

        Returns:
            (B, T, D).
        """
        return _kernel_of(inputs).collect(inputs["x"], _given(inputs))

    def compute_output_spec(self, inputs: Mapping[str, Nested]) -> keras.KerasTensor:
        batch, tokens, _, width = inputs["x"].shape
        return keras.KerasTensor((batch, tokens, width), self.compute_dtype)


def multiply_rows(inputs: Mapping[str, Nested], kernel_EDF: Tensor) -> Tensor:
    """Returns each row's product with the matrix of its expert.

    Args:
        inputs: `x` and `routing`, as for `ExpertDense`.
        kernel_EDF: Matrices.
    """
    kernel = ops.convert_to_tensor(kernel_EDF)
    return _kernel_of(inputs).multiply(inputs["x"], kernel, _given(inputs))


def values_of_rows(inputs: Mapping[str, Nested], values_EF: Tensor) -> Tensor:
    """Returns for each row what belongs to its expert, in a shape that spreads over the rows.

    Args:
        inputs: `x` and `routing`, as for `ExpertDense`.
        values_EF: A vector for each expert.
    """
    values = ops.convert_to_tensor(values_EF)
    return _kernel_of(inputs).of_experts(values, _given(inputs))


def _tag(kernel: ExpertKernel) -> dict[str, Tensor]:
    """Says by the shape of a tensor which kernel it is: only tensors go along edges."""
    return {"kernel": ops.zeros((0, expert_kernels().index(kernel)), "int32")}


def _kernel_of(inputs: Mapping[str, Nested]) -> ExpertKernel:
    tag = inputs["routing"].get("kernel")
    kernels = expert_kernels()
    if tag is None or tag.shape[1] is None:  # symbolic: in stock layers
        return next(kernel for kernel in kernels if kernel.name == "every")
    return kernels[tag.shape[1]]


def _given(inputs: Mapping[str, Nested]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs["routing"].items() if x is not None}
