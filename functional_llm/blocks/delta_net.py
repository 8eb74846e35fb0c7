"""The gated delta net in the place of attention.

Shapes: B batch, T tokens, D model, K key heads, N value heads, H size of keys, V size of values, W
width of the convolution.
"""

from dataclasses import dataclass

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Kept, Shapes
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.convolution import CausalConvolution
from functional_llm.layers.delta_rule import DeltaRule, LogDecay
from functional_llm.layers.states import StateLookup


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """The sizes of a gated delta net.

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
    """Returns what a decoder layer with one `gated_delta_net` keeps."""
    return {"delta_net": {name: Kept(shape, "float32") for name, shape in sizes.states.items()}}


def gated_delta_net(
    sizes: DeltaNet, hidden_dim: int, activation: str, epsilon: float
) -> CompositeLayer:
    """A gated delta net: output(norm(what queries read) * silu(gate)).

    Queries, keys and values go through one short convolution and an activation; queries and keys
    have length one then.

    Args:
        sizes: Of its heads.
        hidden_dim: D.
        activation: Behind the convolution, a key of `ACTIVATIONS`.
        epsilon: Of the norm.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to
        `{"x": (B, T, D), "cache": {"inputs", "matrix"}}`.

    Reference:
        [Gated Delta Networks](https://arxiv.org/abs/2412.06464), figure 1.
    """

    def body(inputs: Inputs) -> dict[str, Nested]:
        x = inputs["x"]
        names = ("cache", "state_position", "positions")
        begin = StateLookup(sizes.states, name="state_lookup")({k: inputs[k] for k in names})
        places = {name: inputs[name] for name in ("positions", "segment_ids")}

        def project(width: int, name: str) -> Tensor:
            return keras.layers.Dense(width, use_bias=False, name=name)(x)

        def split(x: Tensor, sizes: tuple[int, ...], name: str) -> Tensor:
            return keras.layers.Reshape((-1, *sizes), name=f"{name}_heads")(x)

        parts = zip(("query", "key", "value"), sizes.widths, strict=True)
        joined = ops.concatenate([project(width, name) for name, width in parts], axis=-1)
        mixed = CausalConvolution(sizes.width, name="convolution")(
            {"x": joined, "state": begin["inputs"], **places}
        )
        active = ACTIVATIONS[activation](mixed["x"])
        key_width = sizes.widths[0]
        query, key, value = ops.split(active, [key_width, 2 * key_width], axis=-1)
        decay = LogDecay(name="log_decay")(project(sizes.value_heads, "decay"))
        rate = ops.sigmoid(project(sizes.value_heads, "rate"))
        of_keys = (sizes.key_heads, 1, sizes.key_dim)
        of_values = (sizes.key_heads, sizes.group, sizes.value_dim)
        read = DeltaRule(name="delta_rule")(
            {
                "query": unit_length(split(query, of_keys, "query")) * sizes.key_dim**-0.5,
                "key": unit_length(split(key, of_keys, "key")),
                "value": split(value, of_values, "value"),
                "decay": split(decay, of_values[:2], "decay"),
                "rate": split(rate, of_values[:2], "rate"),
                "state": begin["matrix"],
                **places,
            }
        )
        gate = split(project(sizes.widths[2], "gate"), of_values, "gate")
        normed = rms_norm(epsilon, "norm")(read["x"]) * ops.silu(gate)
        merged = keras.layers.Reshape((-1, sizes.widths[2]), name="merge_heads")(normed)
        output = keras.layers.Dense(hidden_dim, use_bias=False, name="output")
        kept = {"inputs": mixed["state"], "matrix": read["state"]}
        cache = {name: ops.expand_dims(state, 1) for name, state in kept.items()}
        return {"x": output(merged), "cache": cache}

    return CompositeLayer(body, name="delta_net", autocast=False)  # a cache keeps its dtypes


def unit_length(x: Tensor) -> Tensor:
    """Returns vectors of length one, in float32; none where there is none."""
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-6)
