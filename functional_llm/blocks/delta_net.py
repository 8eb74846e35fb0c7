"""Delta nets in the place of attention.

Shapes: B batch, T tokens, D model, K key heads, N value heads, H size of keys, V size of values, W
width of the convolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Part, Shapes, apply_parts
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.states import keeping_states, state_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor
from functional_llm.layers.convolution import CausalConvolution
from functional_llm.layers.delta_rule import DeltaRule, LogDecay


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """The sizes of a delta net.

    Args:
        key_heads: K.
        value_heads: N, a multiple of K.
        key_dim: H.
        value_dim: V.
        width: W.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """How many channels queries, keys and values have."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    @property
    def group(self) -> int:
        """How many value heads share a key head."""
        return self.value_heads // self.key_heads

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """What a layer keeps: the last W - 1 inputs of its convolution, and its matrices."""
        matrix = (self.key_heads, self.group, self.key_dim, self.value_dim)
        return {"inputs": (self.width - 1, sum(self.widths)), "matrix": matrix}


def delta_net_shapes(sizes: DeltaNet) -> Shapes:
    """Returns what a decoder layer with one delta net keeps."""
    return state_shapes("delta_net", sizes.states)


def gated_delta_net(
    sizes: DeltaNet, hidden_dim: int, activation: str, epsilon: float
) -> CompositeLayer:
    """A gated delta net: a matrix has one decay, and one convolution mixes all that goes into it.

    Args:
        sizes: Of its heads.
        hidden_dim: D.
        activation: Behind the convolution, a key of `ACTIVATIONS`.
        epsilon: Of the norm.

    Returns:
        As for `delta_net`.

    Reference:
        [Gated Delta Networks](https://arxiv.org/abs/2412.06464), figure 1.
    """

    def convolve(projected: Sequence[Tensor], state: Tensor, places: Inputs) -> Inputs:
        joined = ops.concatenate(projected, axis=-1)
        convolution = CausalConvolution(sizes.width, name="convolution")
        return convolution({"x": joined, "state": state, **places})

    return delta_net(
        sizes,
        hidden_dim,
        convolve,
        ACTIVATIONS[activation],
        decay=[_dense(sizes.value_heads, "decay"), LogDecay(name="log_decay")],
        gate=[_dense(sizes.widths[2], "gate"), lambda x, inputs: ops.silu(x)],
        epsilon=epsilon,
    )


def channel_delta_net(
    sizes: DeltaNet, hidden_dim: int, activation: str, epsilon: float
) -> CompositeLayer:
    """A delta net in which each channel of a key has a decay of its own ("KDA").

    Queries, keys and values have a convolution each. Decays and the gate go through as few channels
    as a head has.

    Args:
        sizes: Of its heads.
        hidden_dim: D.
        activation: Behind the convolutions, a key of `ACTIVATIONS`.
        epsilon: Of the norm.

    Returns:
        As for `delta_net`.

    Reference:
        [Kimi Linear](https://arxiv.org/abs/2510.26692), section 4.
    """

    def convolve(projected: Sequence[Tensor], state: Tensor, places: Inputs) -> Inputs:
        queries, keys, _ = sizes.widths
        states = ops.split(state, [queries, queries + keys], axis=-1)
        results = [
            CausalConvolution(sizes.width, name=f"{name}_convolution")(
                {"x": x, "state": own, **places}
            )
            for name, x, own in zip(_MIXED, projected, states, strict=True)
        ]
        return {
            name: ops.concatenate([result[name] for result in results], axis=-1)
            for name in ("x", "state")
        }

    decays = sizes.value_heads * sizes.key_dim
    return delta_net(
        sizes,
        hidden_dim,
        convolve,
        ACTIVATIONS[activation],
        decay=[
            _dense(sizes.key_dim, "decay_latent"),
            _dense(decays, "decay"),
            LogDecay(sizes.key_dim, name="log_decay"),
        ],
        gate=[
            _dense(sizes.value_dim, "gate_latent"),
            _dense(sizes.widths[2], "gate"),
            lambda x, inputs: ops.sigmoid(x),
        ],
        epsilon=epsilon,
    )


_MIXED = ("query", "key", "value")
# From what is projected, the state before and `positions` and `segment_ids` to `x` and `state`.
Convolve: TypeAlias = Callable[[Sequence[Tensor], Tensor, Inputs], Inputs]


def _dense(width: int, name: str) -> keras.layers.Dense:
    return keras.layers.Dense(width, use_bias=False, name=name)


def delta_net(
    sizes: DeltaNet,
    hidden_dim: int,
    convolve: Convolve,
    activate: Callable[[Tensor], Tensor],
    *,
    decay: Sequence[Part],
    gate: Sequence[Part],
    epsilon: float,
) -> CompositeLayer:
    """The delta rule between projections: output(norm(what queries read) * gate).

    Queries and keys have length one.

    Args:
        sizes: Of its heads.
        hidden_dim: D.
        convolve: Mixes queries, keys and values of neighbouring tokens.
        activate: Of what is mixed.
        decay: Parts from (B, T, D) to the logarithms of decays: (B, T, N), or (B, T, N * H) for one
            of each channel.
        gate: Parts from (B, T, D) to (B, T, N * V).
        epsilon: Of the norm.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to
        `{"x": (B, T, D), "cache": {"inputs", "matrix"}}`.
    """

    def step(inputs: Inputs, begin: Inputs, places: Inputs) -> tuple[Inputs, Inputs]:
        x = inputs["x"]

        def split(x: Tensor, sizes: tuple[int, ...], name: str) -> Tensor:
            return keras.layers.Reshape((-1, *sizes), name=f"{name}_heads")(x)

        projected = [_dense(size, name)(x) for name, size in zip(_MIXED, sizes.widths, strict=True)]
        mixed = convolve(projected, begin["inputs"], places)
        key_width = sizes.widths[0]
        query, key, value = ops.split(activate(mixed["x"]), [key_width, 2 * key_width], axis=-1)
        decays = apply_parts(decay, x, inputs)
        rate = ops.sigmoid(_dense(sizes.value_heads, "rate")(x))
        of_keys = (sizes.key_heads, 1, sizes.key_dim)
        of_values = (sizes.key_heads, sizes.group, sizes.value_dim)
        of_decays = (*of_values[:2], decays.shape[-1] // sizes.value_heads)
        read = DeltaRule(name="delta_rule")(
            {
                "query": unit_length(split(query, of_keys, "query")) * sizes.key_dim**-0.5,
                "key": unit_length(split(key, of_keys, "key")),
                "value": split(value, of_values, "value"),
                "decay": split(decays, of_decays, "decay"),
                "rate": split(rate, of_values[:2], "rate"),
                "state": begin["matrix"],
                **places,
            }
        )
        opened = split(apply_parts(gate, x, inputs), of_values, "gate")
        normed = rms_norm(epsilon, "norm")(read["x"]) * opened
        merged = keras.layers.Reshape((-1, sizes.widths[2]), name="merge_heads")(normed)
        output = keras.layers.Dense(hidden_dim, use_bias=False, name="output")
        return {"x": output(merged)}, {"inputs": mixed["state"], "matrix": read["state"]}

    return keeping_states("delta_net", sizes.states, step)


def unit_length(x: Tensor) -> Tensor:
    """Returns vectors of length one, in float32; none where there is none."""
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-6)
