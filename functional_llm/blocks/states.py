"""What all layers that keep a state have around what they do with it.

Shapes: B batch, T tokens, D model.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from keras import ops

from functional_llm.blocks.attention import Inputs, Kept, Shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested
from functional_llm.layers.states import StateLookup

StateSizes: TypeAlias = Mapping[str, tuple[int, ...]]  # name of a state -> its shape, of one row
# From the layer's inputs, the states before, and `positions` and `segment_ids` of the new tokens,
# to what the layer returns, and the states after.
Step: TypeAlias = Callable[[Inputs, Inputs, Inputs], tuple[Mapping[str, Nested], Inputs]]


def state_shapes(name: str, sizes: StateSizes) -> Shapes:
    """Returns what a decoder layer with one layer of this name keeps: states in float32."""
    return {name: {state: Kept(shape, "float32") for state, shape in sizes.items()}}


def keeping_states(name: str, sizes: StateSizes, step: Step) -> CompositeLayer:
    """A layer that goes on from states, and leaves others.

    Args:
        name: Of the layer.
        sizes: Of the states.
        step: What it does. States are (B, ...), in float32, and zeros before a text.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "segment_ids", "state_position", "cache"}` to what
        the step returns, with `cache`, the states after.
    """

    def body(inputs: Inputs) -> dict[str, Nested]:
        names = ("cache", "state_position", "positions")
        begin = StateLookup(sizes, name="state_lookup")({key: inputs[key] for key in names})
        places = {key: inputs[key] for key in ("positions", "segment_ids")}
        outputs, states = step(inputs, begin, places)
        cache = {key: ops.expand_dims(state, 1) for key, state in states.items()}
        return {**outputs, "cache": cache}

    return CompositeLayer(body, name=name, autocast=False)  # a cache keeps its dtypes
