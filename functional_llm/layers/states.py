"""What a layer keeps of all tokens so far as one state, in the place of keys and values of each.

In a cache, a state is a ring of one slot: the position in that slot is that of the last token which
the state has absorbed, -1 if there is none. So what holds for rings holds for states.

A state depends on the order of the tokens, and on nothing between them: in models with states,
padding is moved behind the tokens at the entrance, and back at the end. Layers that read a state
leave it as it is at padding, which has position -1.

Shapes: B batch, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.types import JSON, Nested, Tensor

PACKAGE = "functional_llm"


@keras.saving.register_keras_serializable(PACKAGE)
class PaddingLast(keras.layers.Layer):
    """Moves the tokens of each row to its begin, in their order, and all padding behind them."""

    may_return_none = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves.

        Args:
            inputs: `token_ids` (B, T); `positions` (B, T) int32, -1 for padding; `segment_ids`
                (B, T) or `None`; `in_order`: the very tensor `positions` if it is certain that
                padding is nowhere else (`Mask.to_tensors`), or `None`.

        Returns:
            The first three; `places` (B, T) int32, where each has gone to, or `None` if nothing was
            to be moved, which is known of one token a row, too.
        """
        positions_BT = inputs["positions"]
        moved = {name: inputs[name] for name in ("token_ids", "positions", "segment_ids")}
        if positions_BT.shape[1] == 1 or inputs["in_order"] is positions_BT:
            return {**moved, "places": None}
        is_token_BT = positions_BT >= 0
        token_BT = ops.cumsum(ops.cast(is_token_BT, "int32"), axis=1)
        padding_BT = ops.cumsum(ops.cast(~is_token_BT, "int32"), axis=1)
        places_BT = ops.where(is_token_BT, token_BT, token_BT[:, -1:] + padding_BT) - 1
        sources_BT = ops.argsort(places_BT, axis=1)

        def move(x_BT: Tensor) -> Tensor:
            return None if x_BT is None else ops.take_along_axis(x_BT, sources_BT, axis=1)

        return {**{name: move(x) for name, x in moved.items()}, "places": places_BT}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        names = ("token_ids", "positions", "segment_ids")
        shape = inputs["positions"].shape
        return {name: keras.KerasTensor(shape, dtype="int32") for name in (*names, "places")}


@keras.saving.register_keras_serializable(PACKAGE)
class PaddingBack(keras.layers.Layer):
    """Moves what was computed for each token back to where `PaddingLast` has taken it from."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Moves back.

        Args:
            inputs: `x` (B, T, D), and the `places` that `PaddingLast` returned.

        Returns:
            (B, T, D).
        """
        if inputs["places"] is None:
            return inputs["x"]
        return ops.take_along_axis(inputs["x"], ops.expand_dims(inputs["places"], 2), axis=1)

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> keras.KerasTensor:
        return keras.KerasTensor(inputs["x"].shape, dtype=inputs["x"].dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class StatePosition(keras.layers.Layer):
    """The position of the last token that states of a type have absorbed: one tag for all."""

    def call(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Returns the tag after the new tokens.

        Args:
            inputs: `positions` (B, T) int32 of the new tokens, -1 for padding; `cache` (B, 1), the
                tag before, or `None`.

        Returns:
            (B, 1) int32; -1 where there has been no token.
        """
        latest_B1 = ops.max(inputs["positions"], axis=1, keepdims=True)
        return latest_B1 if inputs["cache"] is None else ops.maximum(inputs["cache"], latest_B1)

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> keras.KerasTensor:
        return keras.KerasTensor((inputs["positions"].shape[0], 1), dtype="int32")


@keras.saving.register_keras_serializable(PACKAGE)
class StateLookup(keras.layers.Layer):
    """The states that a layer goes on from: those in the cache, or zeros. In float32.

    Args:
        shapes: Name of a state -> its shape, of one row.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def call(self, inputs: Mapping[str, Nested]) -> dict[str, Tensor]:
        """Looks up.

        Args:
            inputs: `cache`: name -> state (B, 1, ...) or `None`; `state_position` (B, 1), the tag
                of these states, or `None`; `positions` (B, T) of the new tokens.

        Returns:
            Name -> state, (B, ...).
        """
        tag_B1, rows = inputs["state_position"], ops.shape(inputs["positions"])[0]

        def begin(shape: tuple[int, ...], kept: Tensor | None) -> Tensor:
            if kept is None or tag_B1 is None:
                return ops.zeros((rows, *shape), "float32")
            is_there = ops.reshape(tag_B1 >= 0, (-1, *(1 for _ in shape)))
            return ops.where(is_there, kept[:, 0], 0.0)

        return {name: begin(shape, inputs["cache"][name]) for name, shape in self.shapes.items()}

    def compute_output_spec(self, inputs: Mapping[str, Nested]) -> dict[str, keras.KerasTensor]:
        batch = inputs["positions"].shape[0]
        return {
            name: keras.KerasTensor((batch, *shape), dtype="float32")
            for name, shape in self.shapes.items()
        }

    def get_config(self) -> JSON:
        return {**super().get_config(), "shapes": self.shapes}
