"""State space of Mamba-2: a matrix for each head, which decays and grows with each token.

Shapes: B batch, T tokens, G groups of heads with the same ways in and out of their states, R heads
in each, P size of a head, N size of a state, H = G * R.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.graph.types import JSON, Tensor

# Tokens. A state of 16 heads goes through 2048 in 64 ms on two cores of a CPU; chunks of 32 and of
# 128 take twice as long.
CHUNK = 64


@keras.saving.register_keras_serializable("functional_llm")
class StateSpace(keras.layers.Layer):
    """Reads and writes a state: y = state c + D x, after state = exp(A dt) state + dt x b.

    The step dt is softplus(dt + bias), A = -exp(a_log). Tokens of a chunk are computed together,
    and chunks one after another; all in float32.

    Args:
        least_step: dt is no less.
        most_step: dt is no more; `None` for no bound.

    Reference:
        [Mamba-2](https://arxiv.org/abs/2405.21060), section 6.
    """

    def __init__(
        self, least_step: float = 0.0, most_step: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.least_step, self.most_step = least_step, most_step

    def build(self, input_shape: Mapping[str, tuple[int | None, ...]]) -> None:
        heads = input_shape["state"][1]
        self.a_log = self.add_weight((heads,), _logarithms, name="a_log")
        self.d = self.add_weight((heads,), "ones", name="d")
        self.dt_bias = self.add_weight((heads,), _first_steps, name="dt_bias")

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Goes through the tokens.

        Args:
            inputs: `x` (B, T, G, R, P); `dt` (B, T, G, R); `b` and `c` (B, T, G, N), the ways into
                the state and out of it; `state` (B, H, P, N) float32; `positions` (B, T) int32, -1
                for padding, at which the state stays as it is; `segment_ids` (B, T) or `None`: each
                begins with an empty state.

        Returns:
            `x` (B, T, G, R, P); `state` after the new tokens.
        """
        return self._through(inputs, in_chunks=True)

    def as_one_chunk(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Does the same without a loop: what it takes grows with the square of T.

        Args:
            inputs: As for `call`.

        Returns:
            As `call`.
        """
        return self._through(inputs, in_chunks=False)

    def _through(self, inputs: Mapping[str, Tensor], in_chunks: bool) -> dict[str, Tensor]:
        x, groups = ops.cast(inputs["x"], "float32"), tuple(inputs["x"].shape[2:4])

        def of_heads(weight: Tensor) -> Tensor:
            return ops.reshape(ops.cast(weight, "float32"), groups)

        is_token_BT = inputs["positions"] >= 0
        dt = ops.softplus(ops.cast(inputs["dt"], "float32") + of_heads(self.dt_bias))
        dt = ops.maximum(dt, self.least_step)
        dt = dt if self.most_step is None else ops.minimum(dt, self.most_step)
        dt_BTGR = ops.where(ops.expand_dims(is_token_BT, (2, 3)), dt, 0.0)
        tokens = {
            "decay": -ops.exp(of_heads(self.a_log)) * dt_BTGR,
            "x": ops.expand_dims(dt_BTGR, 4) * x,
            "b": ops.cast(inputs["b"], "float32"),
            "c": ops.cast(inputs["c"], "float32"),
            "text": _texts(inputs["segment_ids"], is_token_BT),
        }
        sizes = inputs["state"].shape
        state = ops.reshape(inputs["state"], (-1, *groups, *sizes[2:]))
        if in_chunks and x.shape[1] > CHUNK:
            y, state = _chunk_by_chunk(tokens, state)
        else:
            y, state = _one_chunk(tokens, state, ops.zeros_like(tokens["text"][:, 0]))
        y = y + ops.expand_dims(of_heads(self.d), 2) * x
        state = ops.reshape(state, (-1, *sizes[1:]))
        return {"x": ops.cast(y, inputs["x"].dtype), "state": state}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        x, state = inputs["x"], inputs["state"]
        return {
            "x": keras.KerasTensor(x.shape, dtype=x.dtype),
            "state": keras.KerasTensor(state.shape, dtype="float32"),
        }

    def get_config(self) -> JSON:
        own = {"least_step": self.least_step, "most_step": self.most_step}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("functional_llm")
class RMSNormOfGroups(keras.layers.Layer):
    """Root mean square norm of each group of channels, with a learned scale for each channel.

    Args:
        epsilon: Added to the mean square.
        num_groups: How many groups of neighbouring channels there are.
        **kwargs: Of `keras.layers.Layer`.

    Reference:
        [Mamba-2](https://arxiv.org/abs/2405.21060), section 7.2.
    """

    def __init__(self, epsilon: float, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.epsilon, self.num_groups = epsilon, num_groups

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(input_shape[-1:], "ones", name="scale")

    def call(self, inputs: Tensor) -> Tensor:
        """Norms.

        Args:
            inputs: (..., channels).

        Returns:
            As many, in the dtype that the layer computes in.
        """
        parts = ops.split(ops.cast(inputs, "float32"), self.num_groups, axis=-1)
        normed = [ops.rms_normalization(part, epsilon=self.epsilon) for part in parts]
        scale = ops.cast(self.scale, self.compute_dtype)
        return ops.cast(ops.concatenate(normed, axis=-1), self.compute_dtype) * scale

    def compute_output_spec(self, inputs: Tensor) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> JSON:
        own = {"epsilon": self.epsilon, "num_groups": self.num_groups}
        return {**super().get_config(), **own}


def _logarithms(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns log(1), log(2) ...: where Mamba-2 begins."""
    return ops.cast(np.log(np.arange(1, shape[0] + 1)), dtype)


def _first_steps(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns the biases whose softplus is from 0.001 to 0.1."""
    return ops.cast(np.log(np.expm1(np.geomspace(0.001, 0.1, shape[0]))), dtype)


def _texts(segments_BT: Tensor | None, is_token_BT: Tensor) -> Tensor:
    """Returns how many texts have ended before each token of a row; padding ends none."""
    if segments_BT is None:
        return ops.zeros_like(is_token_BT, dtype="int32")
    is_new_BT = ops.concatenate(
        [
            ops.zeros_like(is_token_BT[:, :1]),
            (segments_BT[:, 1:] != segments_BT[:, :-1]) & is_token_BT[:, 1:],
        ],
        axis=1,
    )
    return ops.cumsum(ops.cast(is_new_BT, "int32"), axis=1)


def _one_chunk(
    tokens: Mapping[str, Tensor], state: Tensor, text_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what tokens read, each with what those before it have written, and the state.

    Args:
        tokens: `decay` (B, T, G, R), the logarithm; `x` (B, T, G, R, P); `b`, `c` (B, T, G, N);
            `text` (B, T).
        state: (B, G, R, P, N).
        text_B: The text that the state belongs to.
    """
    x, b_BTGN, c_BTGN, text_BT = (tokens[name] for name in ("x", "b", "c", "text"))
    decay_BGRT = ops.transpose(tokens["decay"], (0, 2, 3, 1))
    place_BT = ops.cumsum(ops.ones_like(text_BT), axis=1)
    # From token s, behind it, to token t: sums of few numbers, as differences of sums are not.
    is_behind_BTS = ops.expand_dims(place_BT, 2) > ops.expand_dims(place_BT, 1)
    is_behind = ops.expand_dims(is_behind_BTS, (1, 2))
    between = ops.cumsum(ops.where(is_behind, ops.expand_dims(decay_BGRT, 4), 0.0), axis=3)
    is_seen_BTS = ops.expand_dims(place_BT, 2) >= ops.expand_dims(place_BT, 1)
    is_same_BTS = ops.equal(ops.expand_dims(text_BT, 2), ops.expand_dims(text_BT, 1))
    is_seen_BTS = ops.logical_and(is_seen_BTS, is_same_BTS)
    left_BGRTS = ops.where(ops.expand_dims(is_seen_BTS, (1, 2)), ops.exp(between), 0.0)
    scores_BGTS = ops.einsum("btgn,bsgn->bgts", c_BTGN, b_BTGN)
    y = ops.einsum("bgrts,bsgrp->btgrp", ops.expand_dims(scores_BGTS, 2) * left_BGRTS, x)
    is_of_state_BT = ops.equal(ops.expand_dims(text_B, 1), text_BT)
    kept_BGRT = ops.where(
        ops.expand_dims(is_of_state_BT, (1, 2)), ops.exp(ops.cumsum(decay_BGRT, axis=3)), 0.0
    )
    read = ops.einsum("btgn,bgrpn->btgrp", c_BTGN, state)
    y = y + read * ops.expand_dims(ops.transpose(kept_BGRT, (0, 3, 1, 2)), 4)
    last_BSGR = ops.transpose(left_BGRTS[:, :, :, -1], (0, 3, 1, 2))
    written = ops.einsum("bsgrp,bsgn->bgrpn", x * ops.expand_dims(last_BSGR, 4), b_BTGN)
    return y, ops.expand_dims(kept_BGRT[..., -1], (3, 4)) * state + written


def _chunk_by_chunk(tokens: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same as `_one_chunk`, of which it makes a loop."""
    length = tokens["x"].shape[1]
    count = -(-length // CHUNK)

    def split(name: str, x: Tensor) -> Tensor:
        """Chunks first. What fills the last one decays by nothing and adds nothing."""
        mode = "edge" if name == "text" else "constant"
        widths = [(0, 0), (0, count * CHUNK - length), *[(0, 0)] * (x.ndim - 2)]
        return ops.moveaxis(
            ops.reshape(ops.pad(x, widths, mode=mode), (-1, count, CHUNK, *x.shape[2:])), 1, 0
        )

    def step(carry: tuple[Tensor, Tensor], chunk: dict[str, Tensor]) -> tuple[Any, Tensor]:
        y, after = _one_chunk(chunk, *carry)
        return (after, chunk["text"][:, -1]), y

    first = (state, ops.zeros_like(tokens["text"][:, 0]))
    (state, _), y = ops.scan(step, first, {name: split(name, x) for name, x in tokens.items()})
    y = ops.reshape(ops.moveaxis(y, 0, 1), (-1, count * CHUNK, *y.shape[3:]))
    return y[:, :length], state
