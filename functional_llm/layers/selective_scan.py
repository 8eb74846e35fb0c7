"""State space of Mamba-1: some numbers for each channel, which decay and grow with each token.

Shapes: B batch, T tokens, I channels, N size of a state.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.graph.types import Tensor
from functional_llm.layers.token_loop import begins_text, through_tokens


@keras.saving.register_keras_serializable("functional_llm")
class SelectiveScan(keras.layers.Layer):
    """Reads and writes a state: y = state c + D x, after state = exp(A dt) state + dt x b.

    The step dt of a channel is softplus(dt + bias), A = -exp(a_log). Tokens go one after another,
    in float32.

    Reference:
        [Mamba](https://arxiv.org/abs/2312.00752), section 3.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def build(self, input_shape: Mapping[str, tuple[int | None, ...]]) -> None:
        _, channels, size = input_shape["state"]
        self.a_log = self.add_weight((channels, size), _logarithms, name="a_log")
        self.d = self.add_weight((channels,), "ones", name="d")
        self.dt_bias = self.add_weight((channels,), _first_steps, name="dt_bias")

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Goes through the tokens.

        Args:
            inputs: `x` and `dt` (B, T, I); `b` and `c` (B, T, N), the ways into the state and out
                of it; `state` (B, I, N) float32; `positions` (B, T) int32, -1 for padding, at
                which the state stays as it is; `segment_ids` (B, T) or `None`: each begins with an
                empty state.

        Returns:
            `x` (B, T, I); `state` after the new tokens.
        """
        is_token_BT = inputs["positions"] >= 0
        x = ops.cast(inputs["x"], "float32")
        dt = ops.softplus(ops.cast(inputs["dt"], "float32") + ops.cast(self.dt_bias, "float32"))
        dt = ops.where(ops.expand_dims(is_token_BT, 2), dt, 0.0)
        keeps_BT = ops.ones_like(inputs["positions"], dtype="float32")
        if inputs["segment_ids"] is not None:
            begins = begins_text(inputs["segment_ids"]) & is_token_BT
            keeps_BT = 1.0 - ops.cast(begins, "float32")
        tokens = {
            "dt": dt,
            "written": dt * x,
            "b": ops.cast(inputs["b"], "float32"),
            "c": ops.cast(inputs["c"], "float32"),
            "keeps": ops.expand_dims(keeps_BT, 2),
        }
        a_IN = -ops.exp(ops.cast(self.a_log, "float32"))

        def step(state_BIN: Tensor, token: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            decay_BIN = ops.exp(ops.expand_dims(token["dt"], 2) * a_IN)
            written_BIN = ops.expand_dims(token["written"], 2) * ops.expand_dims(token["b"], 1)
            state_BIN = ops.expand_dims(token["keeps"], 2) * decay_BIN * state_BIN + written_BIN
            return state_BIN, ops.sum(state_BIN * ops.expand_dims(token["c"], 1), axis=2)

        state, y = through_tokens(step, inputs["state"], tokens)
        y = y + ops.cast(self.d, "float32") * x
        return {"x": ops.cast(y, inputs["x"].dtype), "state": state}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        x, state = inputs["x"], inputs["state"]
        return {
            "x": keras.KerasTensor(x.shape, dtype=x.dtype),
            "state": keras.KerasTensor(state.shape, dtype="float32"),
        }


def _logarithms(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns log(1), log(2) ... for each channel: where Mamba begins."""
    return ops.cast(np.broadcast_to(np.log(np.arange(1, shape[1] + 1)), shape), dtype)


def _first_steps(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns the biases whose softplus is from 0.001 to 0.1."""
    return ops.cast(np.log(np.expm1(np.geomspace(0.001, 0.1, shape[0]))), dtype)
