"""The two branches of an RWKV-7: one through time, one through channels.

Shapes: B batch, T tokens, D model, H heads, N size of a head, F width.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Shapes
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.norm import LayerNormOfHeads
from functional_llm.blocks.states import keeping_states, state_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON, Tensor
from functional_llm.layers.rwkv import StateEvolution, TokenBefore


@keras.saving.register_keras_serializable("functional_llm")
class Mix(CompositeLayer):
    """x + part * (before - x), with a learned part for each channel."""

    def functional_build(self, inputs: Inputs) -> Tensor:
        x, before = inputs["x"], inputs["before"]
        self.part = self.add_weight(x.shape[-1:], "zeros", name="part")
        return x + (before - x) * self.part


@keras.saving.register_keras_serializable("functional_llm")
class Scale(CompositeLayer):
    """Multiplies by learned numbers, of which there are as many as in the last axes.

    Args:
        axes: How many axes.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, axes: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axes = axes

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.scale = self.add_weight(inputs.shape[-self.axes :], "ones", name="scale")
        return inputs * self.scale

    def get_config(self) -> JSON:
        return {**super().get_config(), "axes": self.axes}


@keras.saving.register_keras_serializable("functional_llm")
class HeadBias(CompositeLayer):
    """Adds a learned number for each channel of each head, (..., H, N)."""

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.bias = self.add_weight(inputs.shape[-2:], "zeros", name="bias")
        return inputs + self.bias


def rwkv_shapes(hidden_dim: int, head_dim: int) -> Shapes:
    """Returns what a decoder layer of both branches keeps."""
    time, channel = _time_states(hidden_dim, head_dim), {"before": (hidden_dim,)}
    return {**state_shapes("time_mix", time), **state_shapes("channel_mix", channel)}


def _time_states(hidden_dim: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    return {"before": (hidden_dim,), "state": (hidden_dim // head_dim, head_dim, head_dim)}


def _dense(units: int, name: str) -> keras.layers.Layer:
    return keras.layers.Dense(units, use_bias=False, name=name)


def _low_rank(
    rank: int,
    units: int,
    name: str,
    activation: Callable[[Tensor], Tensor] = lambda x: x,
    bias: bool = True,
) -> Callable[[Tensor], Tensor]:
    """Returns two Dense layers with an activation between them."""
    down = _dense(rank, f"{name}_down")
    up = keras.layers.Dense(units, use_bias=bias, name=f"{name}_up")
    return lambda x: up(activation(down(x)))


def time_mix(
    hidden_dim: int, head_dim: int, epsilon: float, ranks: Mapping[str, int]
) -> CompositeLayer:
    """A state for each head that tokens write to, and read.

    Args:
        hidden_dim: D.
        head_dim: N.
        epsilon: Of the norm of heads.
        ranks: Of the low-rank parts "decay", "rate", "gate", and "value", which a first layer does
            not have: it lends its values to all others, which mix them with their own.

    Returns:
        Layer named "time_mix" from `{"x": (B, T, D), "positions", "segment_ids", "state_position",
        "cache", "lent"}` to `{"x": (B, T, D), "cache"}`; a first one returns "lent", too.

    Reference:
        [RWKV-7](https://arxiv.org/abs/2503.14456), section 4.
    """

    def step(inputs: Inputs, begin: Inputs, places: Inputs) -> tuple[Inputs, Inputs]:
        x = inputs["x"]
        before = TokenBefore(name="token_before")({"x": x, "state": begin["before"], **places})
        names = ("receptance", "decay", "key", "value", "rate", "gate")
        mixed = {name: Mix(name=f"{name}_mix")({"x": x, "before": before["x"]}) for name in names}
        value = own = _dense(hidden_dim, "value")(mixed["value"])
        if "value" in ranks:
            part = _low_rank(ranks["value"], hidden_dim, "value")(mixed["value"])
            value = own + (inputs["lent"] - own) * ops.sigmoid(part)
        heads = _in_heads({**mixed, "value": value}, hidden_dim, head_dim, ranks)
        result = StateEvolution(name="state_evolution")(
            {**heads, "state": begin["state"], **places}
        )
        y = LayerNormOfHeads(epsilon, name="heads_norm")(ops.cast(result["x"], x.dtype))
        bonus = Scale(2, name="bonus")(heads["receptance"] * heads["key"])
        y = HeadBias(name="heads_bias")(y)
        y = y + ops.sum(bonus, axis=-1, keepdims=True) * heads["value"]
        y = keras.layers.Reshape((-1, hidden_dim), name="merge_heads")(y)
        gate = _low_rank(ranks["gate"], hidden_dim, "gate", ops.sigmoid, bias=False)(mixed["gate"])
        states = {"before": before["state"], "state": result["state"]}
        outputs = {"x": _dense(hidden_dim, "output")(y * gate)}
        return (outputs if "value" in ranks else {**outputs, "lent": own}), states

    return keeping_states("time_mix", _time_states(hidden_dim, head_dim), step)


def _in_heads(
    mixed: Mapping[str, Tensor], hidden_dim: int, head_dim: int, ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """Returns what `StateEvolution` takes of each token and head, (B, T, H, N).

    Args:
        mixed: Of each token and the one before, for each name; of "value" the values themselves.
        hidden_dim: D.
        head_dim: N.
        ranks: Of the low-rank parts.
    """

    def in_heads(x: Tensor, name: str, dtype: str | None = None) -> Tensor:
        sizes = (-1, hidden_dim // head_dim, head_dim)
        return keras.layers.Reshape(sizes, name=f"{name}_heads", dtype=dtype)(x)

    key = _dense(hidden_dim, "key")(mixed["key"])
    decay = _low_rank(ranks["decay"], hidden_dim, "decay", ops.tanh)(mixed["decay"])
    decay = -math.exp(-0.5) * ops.sigmoid(ops.cast(decay, "float32"))
    rate = ops.sigmoid(_low_rank(ranks["rate"], hidden_dim, "rate")(mixed["rate"]))
    direction = in_heads(Scale(name="direction")(key), "direction", "float32")
    squares = ops.sum(ops.square(direction), axis=-1, keepdims=True)
    key = key + Scale(name="key_rate")(key * (rate - 1))
    receptance = _dense(hidden_dim, "receptance")(mixed["receptance"])
    return {
        "receptance": in_heads(receptance, "receptance"),
        "decay": in_heads(decay, "decay", "float32"),
        "key": in_heads(key, "key"),
        "value": in_heads(mixed["value"], "value"),
        "rate": in_heads(rate, "rate"),
        "direction": direction * ops.rsqrt(squares + 1e-12),
    }


def channel_mix(intermediate_dim: int, hidden_dim: int, activation: str) -> CompositeLayer:
    """down(activation(up(x))) of a mixture of each token with the one before.

    Args:
        intermediate_dim: F.
        hidden_dim: D.
        activation: A key of `ACTIVATIONS`.

    Returns:
        Layer named "channel_mix" from and to what `time_mix` takes and returns.
    """
    up, down = _dense(intermediate_dim, "up"), _dense(hidden_dim, "down")

    def step(inputs: Inputs, begin: Inputs, places: Inputs) -> tuple[Inputs, Inputs]:
        x = inputs["x"]
        before = TokenBefore(name="token_before")({"x": x, "state": begin["before"], **places})
        mixed = Mix(name="mix")({"x": x, "before": before["x"]})
        return {"x": down(ACTIVATIONS[activation](up(mixed)))}, {"before": before["state"]}

    return keeping_states("channel_mix", {"before": (hidden_dim,)}, step)
