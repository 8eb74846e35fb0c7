"""Experts for many tokens: rows sorted by expert once, for all products until they are summed.

Shapes: as in `every_expert.py`; S rows. A tensor *of rows* is (1, 1, S, ...) here: a row for each
choice, in the order of the experts, behind them those of padding tokens, and some empty ones.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.kernels.every_expert import Routing
from functional_llm.kernels.grouped import Groups, multiply_groups


def tile_height(num_rows: int, num_experts: int, largest: int) -> int:
    """Returns the height of tiles: a power of two from 8 on, 1.5 times the rows of an expert."""
    wanted, height = 1.5 * num_rows / num_experts, 8
    while height < min(wanted, largest):
        height *= 2
    return height


def route(experts_BTk: jax.Array, num_experts: int, largest: int) -> Routing:
    """Returns where everything goes.

    Returns:
        `order` (S,): which of the B * T * k choices each row is; B * T * k for none. `places`
        (B, T, k): each choice's row; S for none. `begins` and `ends` (E,): each expert's rows.
    """
    flat = experts_BTk.reshape(-1)
    count = len(flat)
    empty = tile_height(count, num_experts, largest)
    order = jnp.argsort(flat, stable=True).astype("int32")
    in_order = flat[order]
    ends = jnp.searchsorted(in_order, jnp.arange(num_experts), side="right").astype("int32")
    begins = jnp.concatenate([jnp.zeros(1, "int32"), ends[:-1]])
    places = (
        jnp.zeros(count, "int32")
        .at[order]
        .set(jnp.arange(count, dtype="int32"), unique_indices=True)
    )
    places = jnp.where(flat < num_experts, places, count + empty)
    order = jnp.where(in_order < num_experts, order, count)
    order = jnp.pad(order, (0, empty), constant_values=count)
    experts = jnp.pad(in_order, (0, empty), constant_values=num_experts)
    return {
        "experts": experts,
        "order": order,
        "places": places.reshape(experts_BTk.shape),
        "begins": begins,
        "ends": ends,
    }


def spread(x_BTD: jax.Array, routing: Routing) -> jax.Array:
    """Returns the rows of tokens."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    return _spread(x_ND, routing["order"], routing["places"])[None, None]


def spread_choices(values_BTk: jax.Array, experts_BTk: jax.Array, routing: Routing) -> jax.Array:
    """Returns a number for each row, with an axis of one behind: 0 for rows that do not count."""
    order, places = routing["order"], routing["places"]
    return _move(values_BTk.reshape(-1, 1), order, places.reshape(-1))[None, None]


def multiply(rows: jax.Array, kernel_EDF: jax.Array, routing: Routing, *, name: str) -> jax.Array:
    """Returns each row's product with the matrix of its expert, by `multiply_groups`."""
    height = len(routing["order"]) - routing["places"].size
    groups = Groups(routing["begins"], routing["ends"])
    return multiply_groups(rows[0, 0], kernel_EDF, groups, name, height)[None, None]


def multiply_ragged(rows: jax.Array, kernel_EDF: jax.Array, routing: Routing) -> jax.Array:
    """The same by an instruction that TPUs have; elsewhere XLA multiplies with all experts."""
    counts = routing["ends"] - routing["begins"]
    return lax.ragged_dot(rows[0, 0], kernel_EDF.astype(rows.dtype), counts)[None, None]


def of_experts(values_EF: jax.Array, routing: Routing) -> jax.Array:
    """Returns for each row what belongs to its expert."""
    return values_EF[jnp.minimum(routing["experts"], len(values_EF) - 1)]


def collect(rows: jax.Array, routing: Routing) -> jax.Array:
    """Returns the sum of each token's rows that count, (B, T, D)."""
    order, places = routing["order"], routing["places"]
    of_choices = _move(rows[0, 0], places.reshape(-1), order)
    return of_choices.reshape(*places.shape, -1).sum(2).astype(rows.dtype)


# Moving rows is gathering in both directions: the gradient XLA makes of a gather is a scatter.


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns entries along the first axis, zeros beyond the last one."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    return _take(x, index)


def _move_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, Any]:
    return _take(x, index), inverse


def _move_backward(inverse: jax.Array, d_out: jax.Array) -> tuple[Any, ...]:
    return _take(d_out, inverse), None, None


_move.defvjp(_move_forward, _move_backward)


@jax.custom_vjp
def _spread(x: jax.Array, order: jax.Array, places: jax.Array) -> jax.Array:
    return _take(x, order // places.shape[-1])


def _spread_forward(x: jax.Array, order: jax.Array, places: jax.Array) -> tuple[jax.Array, Any]:
    return _spread(x, order, places), places


def _spread_backward(places: jax.Array, d_out: jax.Array) -> tuple[Any, ...]:
    of_choices = _take(d_out, places.reshape(-1, places.shape[-1]))
    return of_choices.sum(1).astype(d_out.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)

walk = partial(multiply, name="walk")
tiles = partial(multiply, name="tiles")
