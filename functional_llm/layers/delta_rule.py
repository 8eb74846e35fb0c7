"""The gated delta rule: a matrix from keys to values that each token decays and corrects.

Shapes: B batch, T tokens, K key heads, G value heads a key head, H size of keys, V of values. L is
1 where all channels of a key decay alike, else H.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.types import JSON, Tensor
from functional_llm.kernels.delta_rule import DeltaInputs, delta_rule, delta_rule_in_chunks

_PACKAGE = "functional_llm"


@keras.saving.register_keras_serializable(_PACKAGE)
class DeltaRule(keras.layers.Layer):
    """What queries read of a matrix that each token decays and corrects, in float32.

    Padding leaves the matrix as it is, and each segment of a packed row begins with none.

    Reference:
        [Gated Delta Networks](https://arxiv.org/abs/2412.06464), section 3;
        [Kimi Linear](https://arxiv.org/abs/2510.26692), section 3, with a decay of each channel.
    """

    in_chunks = True  # by a loop; a stock file has the definition, which has none

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reads and corrects.

        Args:
            inputs: `query` and `key` (B, T, K, 1, H); `value` (B, T, K, G, V); `decay`
                (B, T, K, G, L), the logarithm of what each token leaves of the matrix; `rate`
                (B, T, K, G), from 0 to 1, by how much it corrects; `state` (B, K, G, H, V) float32;
                `positions` (B, T), -1 for padding, which stands behind all tokens, or before all of
                them and an empty state; `segment_ids` (B, T) or `None`.

        Returns:
            `x` (B, T, K, G, V) and `state` after the new tokens, both float32.
        """
        is_token_BT = inputs["positions"] >= 0

        def of_heads(x: Tensor) -> Tensor:
            """Returns (B, T, K, G, size) as (B, K, G, T, size)."""
            return ops.cast(ops.transpose(x, (0, 2, 3, 1, 4)), "float32")

        def at_tokens(x: Tensor) -> Tensor:
            """Returns (B, T, K, G, size) as (B, K, G, T, size), 0 at padding."""
            is_token = ops.expand_dims(is_token_BT, (2, 3, 4))
            return of_heads(ops.where(is_token, x, ops.cast(0, x.dtype)))

        rule = delta_rule_in_chunks if self.in_chunks else delta_rule
        query, key, value = (of_heads(inputs[name]) for name in ("query", "key", "value"))
        decay, rate = at_tokens(inputs["decay"]), at_tokens(ops.expand_dims(inputs["rate"], -1))
        texts = _texts(inputs["segment_ids"], is_token_BT)
        all_inputs = DeltaInputs(query, key, value, decay, rate[..., 0], *texts)
        x, state = rule(all_inputs, inputs["state"])
        return {"x": ops.transpose(x, (0, 3, 1, 2, 4)), "state": state}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        return {
            "x": keras.KerasTensor(inputs["value"].shape, dtype="float32"),
            "state": keras.KerasTensor(inputs["state"].shape, dtype="float32"),
        }


def _texts(segments_BT: Tensor | None, is_token_BT: Tensor) -> tuple[Tensor, ...]:
    """Returns a number for the text of each token, and of the state before.

    Padding belongs to the text before it.
    """
    if segments_BT is None:
        return ()
    changes_BT = ops.concatenate(
        [
            ops.zeros_like(segments_BT[:, :1], dtype="bool"),
            segments_BT[:, 1:] != segments_BT[:, :-1],
        ],
        axis=1,
    )
    begins_BT = ops.logical_and(changes_BT, is_token_BT)
    text_BT = ops.cumsum(ops.cast(begins_BT, "int32"), axis=1)
    text = ops.expand_dims(text_BT, (1, 2))
    return text, ops.zeros_like(text[..., :1])


@keras.saving.register_keras_serializable(_PACKAGE)
class LogDecay(keras.layers.Layer):
    """The logarithm of a decay: -rate * softplus(x + shift), with a shift of each channel.

    From (..., channels) to float32 of the same shape. As many channels as the argument says share a
    rate.

    Args:
        channels: Of each rate.
        **kwargs: Of `keras.layers.Layer`.

    Reference:
        [Mamba-2](https://arxiv.org/abs/2405.21060), section 7.
    """

    def __init__(self, channels: int = 1, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.channels = channels

    def build(self, input_shape: tuple[int, ...]) -> None:
        size = input_shape[-1]
        self.log_rate = self.add_weight((size // self.channels,), "zeros", name="log_rate")
        self.shift = self.add_weight((size,), "ones", name="shift")

    def call(self, inputs: Tensor) -> Tensor:
        """Returns the logarithm of the decay."""
        log_rate, shift, x = (ops.cast(x, "float32") for x in (self.log_rate, self.shift, inputs))
        rate = ops.repeat(ops.exp(log_rate), self.channels)
        return -rate * ops.softplus(x + shift)

    def compute_output_spec(self, inputs: Tensor) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype="float32")

    def get_config(self) -> JSON:
        return {**super().get_config(), "channels": self.channels}
