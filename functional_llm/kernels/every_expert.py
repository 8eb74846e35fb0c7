"""Experts as they are defined: every expert for every token, in the operations of Keras.

Shapes: B batch, T tokens, D in, F out, E experts, k experts chosen for each token. A tensor *of
rows* is (B, T, E, ...) here: a row for each token and expert.
"""

from typing import Any, TypeAlias

import numpy as np
from keras import ops

Tensor: TypeAlias = Any  # of the backend, or symbolic
Routing: TypeAlias = dict[str, Tensor]


def route(experts_BTk: Tensor, num_experts: int) -> Routing:
    """Returns which rows count: `members` (B, T, E), boolean.

    Args:
        experts_BTk: Experts chosen for each token; `num_experts` for none.
        num_experts: E.
    """
    return {"members": ops.any(_chosen(experts_BTk, num_experts), axis=2)}


def spread(x_BTD: Tensor, routing: Routing) -> Tensor:
    """Returns the rows of tokens."""
    return ops.repeat(ops.expand_dims(x_BTD, 2), routing["members"].shape[-1], axis=2)


def spread_choices(values_BTk: Tensor, experts_BTk: Tensor, routing: Routing) -> Tensor:
    """Returns a number for each row, with an axis of one behind: 0 for rows that do not count."""
    chosen = _chosen(experts_BTk, routing["members"].shape[-1])
    zeros = ops.zeros_like(ops.expand_dims(values_BTk, 3))
    of_rows = ops.sum(ops.where(chosen, ops.expand_dims(values_BTk, 3), zeros), axis=2)
    return ops.expand_dims(of_rows, 3)


def multiply(rows_BTED: Tensor, kernel_EDF: Tensor, routing: Routing) -> Tensor:
    """Returns each row's product with the matrix of its expert.

    This is the definition: every other kernel is compared with it, values and gradients. Rows that
    do not count may get anything that is finite.
    """
    return ops.einsum("bted,edf->btef", rows_BTED, ops.cast(kernel_EDF, rows_BTED.dtype))


def of_experts(values_EF: Tensor, routing: Routing) -> Tensor:
    """Returns for each row what belongs to its expert, in a shape that spreads over the rows."""
    return values_EF


def collect(rows_BTED: Tensor, routing: Routing) -> Tensor:
    """Returns the sum of each token's rows that count, (B, T, D)."""
    members = ops.expand_dims(routing["members"], 3)
    return ops.sum(ops.where(members, rows_BTED, ops.zeros_like(rows_BTED)), axis=2)


def _chosen(experts_BTk: Tensor, num_experts: int) -> Tensor:
    """Returns booleans (B, T, k, E)."""
    return ops.equal(ops.expand_dims(experts_BTk, 3), np.arange(num_experts, dtype="int32"))
