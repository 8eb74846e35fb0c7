"""What depends on whether a whole text is long, and changes for all of it when it becomes so.

Shapes: B batch, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.selection import walk
from functional_llm.graph.types import JSON, Tensor


@keras.saving.register_keras_serializable("functional_llm")
class IsLongText(keras.layers.Layer):
    """Whether the text of a token goes beyond a length: in a row, or in a segment of a row.

    What a cache keeps of the tokens before that length was computed as for a short text. A text
    that gets there while it is written is to be read again from its start: `turning_lengths`.

    Args:
        length: Tokens of the longest text that is not long.
    """

    def __init__(self, length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = length

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Tells.

        Args:
            inputs: `positions` (B, T) int32, -1 for padding; `segment_ids` (B, T) int32, or `None`
                if each row is one text.

        Returns:
            Boolean, (B, T, 1, 1), or (B, 1, 1, 1) without segments.
        """
        is_beyond_BT = inputs["positions"] >= self.length
        if inputs["segment_ids"] is None:
            is_long = ops.any(is_beyond_BT, axis=1, keepdims=True)
        else:
            segments_BT = inputs["segment_ids"]
            is_same_BTT = ops.expand_dims(segments_BT, 2) == ops.expand_dims(segments_BT, 1)
            both_BTT = ops.logical_and(is_same_BTT, ops.expand_dims(is_beyond_BT, 1))
            is_long = ops.any(both_BTT, axis=2)
        return ops.expand_dims(is_long, (2, 3))

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> keras.KerasTensor:
        return keras.KerasTensor((inputs["positions"].shape[0], None, 1, 1), dtype="bool")

    def get_config(self) -> JSON:
        return {**super().get_config(), "length": self.length}


def turning_lengths(model: keras.Model) -> list[int]:
    """Returns the lengths beyond which a model reads the whole of a text in another way.

    A cache that was filled by a text of one side is of no use to a text of the other.

    Args:
        model: A Backbone, or any functional model; rewired or not.
    """
    return sorted({layer.length for _, layer in walk(model) if isinstance(layer, IsLongText)})
