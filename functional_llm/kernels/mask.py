"""Which slots each query sees, as a description: a kernel makes of it what it needs.

Shapes: B batch, T query tokens, S key slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from keras import ops

Tensor: TypeAlias = Any  # of the backend, or symbolic


@dataclass(frozen=True)
class Mask:
    """A query sees a slot if every part that is there allows it.

    Args:
        query_positions: (B, T) int32, -1 for padding, which sees nothing.
        slot_positions: (B, S) int32, -1 for an empty slot, which nobody sees. A query sees slots of
            positions up to its own. `None` together with `query_positions`: there is no such rule.
        segment_ids: (B, T) int32: a token sees its own segment. The slots are the queries' tokens.
        mask: (B, T, S) boolean: a query sees no slot at which it is `False`.
        first_positions: (B, T) int32: a query sees no slot of a position below its own one here.
        window: How many positions a query sees, its own included.
        in_order: Whether it is certain that the slots are the queries' tokens, and that in each row
            they have the positions 0, 1, 2 ..., padding only behind them.
    """

    query_positions: Tensor | None = None
    slot_positions: Tensor | None = None
    segment_ids: Tensor | None = None
    mask: Tensor | None = None
    first_positions: Tensor | None = None
    window: int | None = None
    in_order: bool = False

    @classmethod
    def from_tensors(cls, tensors: Tensor | Mapping[str, Tensor | None]) -> Self:
        """Returns the mask that tensors describe.

        Args:
            tensors: A boolean (B, T, S), or what `to_tensors` returns; what is absent may be left
                out.
        """
        if not isinstance(tensors, Mapping):
            return cls(mask=tensors)
        parts = dict(tensors)
        window, ordered = parts.pop("window", None), parts.pop("in_order", None)
        places = parts.get("query_positions"), parts.get("slot_positions")
        return cls(
            **parts,
            window=None if window is None else int(window.shape[1]),
            in_order=ordered is not None and all(x is ordered for x in places),
        )

    def to_tensors(self) -> dict[str, Tensor | None]:
        """Returns the parts as tensors: only these go along the edges of a graph.

        Programs are made for tensors of known shapes and unknown values. So what must be known then
        is told otherwise: `window` by the shape of a tensor (0, window), `in_order` by being the
        very tensor that the positions are. Whoever changes those in between, in an edited graph
        say, makes other tensors, and the claim is gone.
        """
        return {
            **vars(self),
            "window": None if self.window is None else ops.zeros((0, self.window), "int32"),
            "in_order": self.query_positions if self.in_order else None,
        }

    def visible(self) -> Tensor:
        """Returns the boolean mask (B, T, S)."""
        parts = []
        if self.slot_positions is not None:
            query_BT1 = ops.expand_dims(self.query_positions, 2)
            slot_B1S = ops.expand_dims(self.slot_positions, 1)
            parts += [slot_B1S >= 0, slot_B1S <= query_BT1]
            if self.window is not None:
                parts.append(query_BT1 - slot_B1S < self.window)
            if self.first_positions is not None:
                parts.append(slot_B1S >= ops.expand_dims(self.first_positions, 2))
        if self.segment_ids is not None:
            parts.append(
                ops.expand_dims(self.segment_ids, 2) == ops.expand_dims(self.segment_ids, 1)
            )
        if self.mask is not None:
            parts.append(self.mask)
        visible_BTS = parts[0]
        for part in parts[1:]:
            visible_BTS = ops.logical_and(visible_BTS, part)
        return visible_BTS
