"""Mamba-1 in the place of attention.

Shapes: B batch, T tokens, D model, W width of the convolution; I channels, N size of a channel's
state, R rank of the steps.
"""

from dataclasses import dataclass

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Shapes
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.states import keeping_states, state_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.layers.convolution import CausalConvolution
from functional_llm.layers.selective_scan import SelectiveScan


@dataclass(frozen=True, kw_only=True)
class ScanSizes:
    """The sizes of a Mamba-1 layer.

    Args:
        channels: I.
        state_dim: N.
        step_rank: R.
        width: W.
    """

    channels: int
    state_dim: int
    step_rank: int
    width: int

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Name of a state -> its shape."""
        return {
            "inputs": (self.width - 1, self.channels),
            "state": (self.channels, self.state_dim),
        }


def mamba_shapes(sizes: ScanSizes) -> Shapes:
    """Returns what a decoder layer with one `mamba` keeps."""
    return state_shapes("mamba", sizes.states)


def mamba(
    sizes: ScanSizes,
    hidden_dim: int,
    *,
    activation: str = "silu",
    use_bias: bool = False,
    convolution_bias: bool = True,
) -> CompositeLayer:
    """A selective state space between a short convolution and a gate.

    Args:
        sizes: I, N, R and W.
        hidden_dim: D.
        activation: A key of `ACTIVATIONS`, behind the convolution.
        use_bias: Whether the first and the last projection add biases.
        convolution_bias: Whether the convolution does.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to
        `{"x": (B, T, D), "cache": {"inputs", "state"}}`.

    Reference:
        [Mamba](https://arxiv.org/abs/2312.00752), section 3.
    """
    rank, ways = sizes.step_rank, sizes.state_dim

    def step(inputs: Inputs, begin: Inputs, at: Inputs) -> tuple[Inputs, Inputs]:
        project = keras.layers.Dense(2 * sizes.channels, use_bias=use_bias, name="input")
        mixed, z = ops.split(project(inputs["x"]), 2, axis=-1)
        convolution = CausalConvolution(sizes.width, convolution_bias, name="convolution")
        around = convolution({"x": mixed, "state": begin["inputs"], **at})
        x = ACTIVATIONS[activation](around["x"])
        select = keras.layers.Dense(rank + 2 * ways, use_bias=False, name="selection")
        dt, b, c = ops.split(select(x), [rank, rank + ways], axis=-1)
        widen = keras.layers.Dense(sizes.channels, use_bias=False, name="step")
        result = SelectiveScan(name="scan")(
            {"x": x, "dt": widen(dt), "b": b, "c": c, "state": begin["state"], **at}
        )
        output = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="output")
        states = {"inputs": around["state"], "state": result["state"]}
        return {"x": output(result["x"] * ops.silu(z))}, states

    return keeping_states("mamba", sizes.states, step)
