"""What RWKV keeps of a text: the token before, and a matrix for each head.

Shapes: B batch, T tokens, D model, H heads, N size of a head.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.types import Tensor
from functional_llm.layers.token_loop import begins_text, through_tokens


@keras.saving.register_keras_serializable("functional_llm")
class TokenBefore(keras.layers.Layer):
    """What stands before each token: zeros before the first one of a text."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shifts.

        Args:
            inputs: `x` (B, T, D); `state` (B, D) float32, what stands before the first; `positions`
                (B, T) int32, -1 for padding, which stands behind all tokens; `segment_ids` (B, T)
                or `None`.

        Returns:
            `x` (B, T, D); `state`, the last token of each row.
        """
        x_BTD, is_token_BT = inputs["x"], inputs["positions"] >= 0
        begin_B1D = ops.expand_dims(ops.cast(inputs["state"], x_BTD.dtype), 1)
        joined = ops.concatenate([begin_B1D, x_BTD], axis=1)
        count_B11 = ops.sum(ops.cast(is_token_BT, "int32"), axis=1)[:, None, None]
        state = ops.take_along_axis(joined, count_B11, axis=1)[:, 0]
        before = joined[:, :-1]
        if inputs["segment_ids"] is not None:
            is_first_BT = begins_text(inputs["segment_ids"])
            before = ops.where(ops.expand_dims(is_first_BT, 2), ops.cast(0, x_BTD.dtype), before)
        return {"x": before, "state": ops.cast(state, "float32")}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        x, state = inputs["x"], inputs["state"]
        return {
            "x": keras.KerasTensor(x.shape, dtype=x.dtype),
            "state": keras.KerasTensor(state.shape, dtype="float32"),
        }


@keras.saving.register_keras_serializable("functional_llm")
class StateEvolution(keras.layers.Layer):
    """Reads a matrix of each head after what each token makes of it, all in float32.

    state = state (diag(decay) - direction (rate * direction)^T) + value key^T, and then
    y = state receptance.

    Reference:
        [RWKV-7](https://arxiv.org/abs/2503.14456), section 4.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Goes through the tokens.

        Args:
            inputs: `receptance`, `decay` (the logarithm), `key`, `value`, `direction` (of length
                1), `rate`, each (B, T, H, N); `state` (B, H, N, N) float32; `positions` (B, T)
                int32, -1 for padding, at which the state stays as it is; `segment_ids` (B, T) or
                `None`: each begins with an empty state.

        Returns:
            `x` (B, T, H, N) float32; `state` after the new tokens.
        """
        names = ("receptance", "decay", "key", "value", "direction", "rate")
        is_token = ops.expand_dims(inputs["positions"] >= 0, (2, 3))
        tokens = {
            name: ops.where(is_token, ops.cast(inputs[name], "float32"), 0.0) for name in names
        }
        keeps_BT = ops.ones_like(inputs["positions"], dtype="float32")
        if inputs["segment_ids"] is not None:
            begins = begins_text(inputs["segment_ids"]) & (inputs["positions"] >= 0)
            keeps_BT = 1.0 - ops.cast(begins, "float32")
        tokens["keeps"] = ops.expand_dims(keeps_BT, (2, 3))
        state, y = through_tokens(_step, inputs["state"], tokens)
        return {"x": y, "state": state}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        shape, state = inputs["receptance"].shape, inputs["state"]
        return {
            "x": keras.KerasTensor(shape, dtype="float32"),
            "state": keras.KerasTensor(state.shape, dtype="float32"),
        }


def _step(state_BHVK: Tensor, token: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the state after one token, and what it reads."""
    state_BHVK = state_BHVK * ops.expand_dims(token["keeps"], 3)
    direction_BHK = token["direction"]
    there_BHV = ops.sum(state_BHVK * ops.expand_dims(direction_BHK, 2), axis=3)
    state_BHVK = (
        state_BHVK * ops.expand_dims(ops.exp(token["decay"]), 2)
        - ops.expand_dims(there_BHV, 3) * ops.expand_dims(token["rate"] * direction_BHK, 2)
        + ops.expand_dims(token["value"], 3) * ops.expand_dims(token["key"], 2)
    )
    return state_BHVK, ops.sum(state_BHVK * ops.expand_dims(token["receptance"], 2), axis=3)
