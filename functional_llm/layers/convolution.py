"""Short causal convolution: each channel by itself, over a token and the few before it.

Shapes: B batch, T tokens, C channels, W width of the kernel.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.types import JSON, Tensor


@keras.saving.register_keras_serializable("functional_llm")
class CausalConvolution(keras.layers.Layer):
    """A weighted sum of a token and the W - 1 before it, with a weight for each channel of each.

    Its state is what it was given at the last W - 1 tokens.

    Args:
        width: W.
        use_bias: Whether to add a number for each channel.
    """

    def __init__(self, width: int, use_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.width = width
        self.use_bias = use_bias

    def build(self, input_shape: Mapping[str, tuple[int | None, ...]]) -> None:
        channels = input_shape["x"][-1]
        self.kernel = self.add_weight((self.width, channels), "glorot_uniform", name="kernel")
        self.bias = self.add_weight((channels,), "zeros", name="bias") if self.use_bias else None

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convolves.

        Args:
            inputs: `x` (B, T, C); `state` (B, W - 1, C) float32; `positions` (B, T) int32, -1 for
                padding, which stands behind all tokens, or before all of them and an empty state;
                `segment_ids` (B, T) or `None`: a token is summed with those of its own segment.

        Returns:
            `x` (B, T, C); `state` after the new tokens.
        """
        x_BTC, positions_BT = inputs["x"], inputs["positions"]
        before, dtype = self.width - 1, x_BTC.dtype
        is_token_BT = positions_BT >= 0
        x_BTC = ops.where(ops.expand_dims(is_token_BT, 2), x_BTC, ops.cast(0, dtype))
        # A sum of shifted products: CPUs take 150 times as long for XLA's grouped convolution.
        joined = ops.concatenate([ops.cast(inputs["state"], dtype), x_BTC], axis=1)
        kernel_WC = ops.cast(self.kernel, "float32")
        total = ops.cast(x_BTC, "float32") * kernel_WC[before]
        for back in range(1, self.width):
            term = ops.cast(joined[:, before - back : -back], "float32") * kernel_WC[before - back]
            total = total + self._within(inputs["segment_ids"], back, term)
        if self.bias is not None:
            total = total + ops.cast(self.bias, "float32")
        # What follows the last token's place, counted from 1, ends with the last token.
        places_BT = ops.cumsum(ops.ones_like(positions_BT), axis=1)
        last_B1 = ops.max(ops.where(is_token_BT, places_BT, 0), axis=1, keepdims=True)
        indices_BW = last_B1 + ops.arange(before, dtype="int32")
        state = ops.take_along_axis(joined, ops.expand_dims(indices_BW, 2), axis=1)
        return {"x": ops.cast(total, dtype), "state": ops.cast(state, "float32")}

    def _within(self, segments_BT: Tensor | None, back: int, term_BTC: Tensor) -> Tensor:
        """Returns the term without what comes from another segment."""
        if segments_BT is None:
            return term_BTC
        is_same_BT = ops.concatenate(
            [
                ops.zeros_like(segments_BT[:, :back], dtype="bool"),
                segments_BT[:, back:] == segments_BT[:, :-back],
            ],
            axis=1,
        )
        return ops.where(ops.expand_dims(is_same_BT, 2), term_BTC, 0.0)

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        x, state = inputs["x"], inputs["state"]
        return {
            "x": keras.KerasTensor(x.shape, dtype=x.dtype),
            "state": keras.KerasTensor(state.shape, dtype="float32"),
        }

    def get_config(self) -> JSON:
        return {**super().get_config(), "width": self.width, "use_bias": self.use_bias}
