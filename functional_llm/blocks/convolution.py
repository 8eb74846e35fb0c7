"""Short convolutions in the place of attention.

Shapes: B batch, T tokens, D model, W width of the kernel.
"""

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Shapes
from functional_llm.blocks.states import keeping_states, state_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.layers.convolution import CausalConvolution


def convolution_shapes(width: int, hidden_dim: int) -> Shapes:
    """Returns what a decoder layer with one `gated_convolution` keeps: W - 1 of its inputs."""
    return state_shapes("convolution", {"inputs": (width - 1, hidden_dim)})


def gated_convolution(width: int, hidden_dim: int, use_bias: bool = False) -> CompositeLayer:
    """A short causal convolution between two gates: output(after * convolution(before * x)).

    Args:
        width: W.
        hidden_dim: D.
        use_bias: Whether the projections and the convolution add biases.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to
        `{"x": (B, T, D), "cache": {"inputs"}}`.

    Reference:
        [LFM2](https://arxiv.org/abs/2511.23404).
    """

    def step(inputs: Inputs, begin: Inputs, places: Inputs) -> tuple[Inputs, Inputs]:
        project = keras.layers.Dense(3 * hidden_dim, use_bias=use_bias, name="input")
        before, after, x = ops.split(project(inputs["x"]), 3, axis=-1)
        result = CausalConvolution(width, use_bias, name="convolution")(
            {"x": before * x, "state": begin["inputs"], **places}
        )
        output = keras.layers.Dense(hidden_dim, use_bias=use_bias, name="output")
        return {"x": output(after * result["x"])}, {"inputs": result["state"]}

    return keeping_states("convolution", {"inputs": (width - 1, hidden_dim)}, step)
