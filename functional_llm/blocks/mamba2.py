"""Mamba-2 in the place of attention.

Shapes: B batch, T tokens, D model, W width of the convolution; G groups, H heads, P size of a head,
I = H * P, N size of a state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Part, Shapes, apply_parts
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.states import keeping_states, state_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor
from functional_llm.layers.convolution import CausalConvolution
from functional_llm.layers.state_space import RMSNormOfGroups, StateSpace

Gate = Callable[[Tensor, Tensor], Tensor]  # what was read from the state, and the gate z, (B, T, I)


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """The sizes of a Mamba-2 layer.

    Args:
        num_heads: H.
        head_dim: P.
        num_groups: G: heads of a group share their ways into the states, and out of them.
        state_dim: N.
        width: W.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    width: int

    @property
    def inner_dim(self) -> int:
        """I."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """How many channels the convolution has: of x, and of the ways in and out."""
        return self.inner_dim + 2 * self.num_groups * self.state_dim

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Name of a state -> its shape."""
        return {
            "inputs": (self.width - 1, self.channels),
            "state": (self.num_heads, self.head_dim, self.state_dim),
        }


def mamba2_shapes(sizes: StateSizes) -> Shapes:
    """Returns what a decoder layer with one `mamba2` keeps."""
    return state_shapes("mamba", sizes.states)


def gated_norm(epsilon: float, num_groups: int = 1) -> Gate:
    """Joins what was read and the gate as norm(y * silu(z)).

    Args:
        epsilon: Of the norm.
        num_groups: How many groups of channels are normed each by itself.
    """
    norm = RMSNormOfGroups(epsilon, num_groups, name="norm")
    return lambda y, z: norm(ops.cast(y, "float32") * ops.silu(ops.cast(z, "float32")))


def norm_before_gate(epsilon: float, num_groups: int = 1) -> Gate:
    """Joins them as norm(y) * silu(z).

    Args:
        epsilon: As for `gated_norm`.
        num_groups: As for `gated_norm`.
    """
    norm = RMSNormOfGroups(epsilon, num_groups, name="norm")
    return lambda y, z: norm(y) * ops.silu(z)


def gate_alone(y: Tensor, z: Tensor) -> Tensor:
    """Joins them as y * silu(z)."""
    return y * ops.silu(z)


def mamba2(
    sizes: StateSizes,
    hidden_dim: int,
    gate: Gate,
    *,
    activation: str = "silu",
    steps: tuple[float, float | None] = (0.0, None),
    input_bias: bool = False,
    convolution_bias: bool = True,
    output_bias: bool = False,
    projected: Sequence[Part] = (),
) -> CompositeLayer:
    """A selective state space between a short convolution and a gate.

    Args:
        sizes: H, P, G, N and W.
        hidden_dim: D.
        gate: What joins what was read from the state and the gate: `gated_norm`, or your own.
        activation: A key of `ACTIVATIONS`, behind the convolution.
        steps: The least and the largest step; `None` for no bound.
        input_bias: Whether the first projection adds biases.
        convolution_bias: Whether the convolution does.
        output_bias: Whether the last projection does.
        projected: Parts after the first projection, whose channels are z, x, the ways in, the ways
            out, and the steps.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to
        `{"x": (B, T, D), "cache": {"inputs", "state"}}`.

    Reference:
        [Mamba-2](https://arxiv.org/abs/2405.21060), section 7.
    """
    inner, groups, ways = sizes.inner_dim, sizes.num_groups, sizes.num_groups * sizes.state_dim
    heads = (-1, groups, sizes.num_heads // groups)

    def step(inputs: Inputs, begin: Inputs, at: Inputs) -> tuple[Inputs, Inputs]:
        width = inner + sizes.channels + sizes.num_heads
        project = keras.layers.Dense(width, use_bias=input_bias, name="input")
        whole = apply_parts(projected, project(inputs["x"]), inputs)
        z, mixed, dt = ops.split(whole, [inner, inner + sizes.channels], axis=-1)
        convolution = CausalConvolution(sizes.width, convolution_bias, name="convolution")
        around = convolution({"x": mixed, "state": begin["inputs"], **at})
        mixed = ACTIVATIONS[activation](around["x"])
        x, b, c = ops.split(mixed, [inner, inner + ways], axis=-1)
        result = StateSpace(*steps, name="state_space")(
            {
                "x": keras.layers.Reshape((*heads, sizes.head_dim))(x),
                "dt": keras.layers.Reshape(heads)(dt),
                "b": keras.layers.Reshape((-1, groups, sizes.state_dim))(b),
                "c": keras.layers.Reshape((-1, groups, sizes.state_dim))(c),
                "state": begin["state"],
                **at,
            }
        )
        y = keras.layers.Reshape((-1, inner), name="merge_heads")(result["x"])
        output = keras.layers.Dense(hidden_dim, use_bias=output_bias, name="output")
        states = {"inputs": around["state"], "state": result["state"]}
        return {"x": output(gate(y, z))}, states

    return keeping_states("mamba", sizes.states, step)
