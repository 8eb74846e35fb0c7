"""Experts for few tokens: a row for each choice, and only the chosen experts' matrices are read.

Shapes: as in `every_expert.py`. A tensor *of rows* is (B, T, k, ...) here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.kernels.every_expert import Routing


def route(experts_BTk: jax.Array, num_experts: int) -> Routing:
    """Returns `experts`, (B, T, k): `num_experts` for none."""
    return {"experts": experts_BTk, "members": experts_BTk < num_experts}


def spread(x_BTD: jax.Array, routing: Routing) -> jax.Array:
    """Returns the rows of tokens."""
    return jnp.repeat(x_BTD[:, :, None], routing["experts"].shape[2], axis=2)


def spread_choices(values_BTk: jax.Array, experts_BTk: jax.Array, routing: Routing) -> jax.Array:
    """Returns a number for each row, with an axis of one behind: 0 for rows that do not count."""
    return jnp.where(routing["members"], values_BTk, 0)[..., None].astype(values_BTk.dtype)


def multiply_one_by_one(rows: jax.Array, kernel_EDF: jax.Array, routing: Routing) -> jax.Array:
    """Returns each row's product with the matrix of its expert, row after row: for CPUs."""

    def step(_: None, row_and_expert: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        row, expert = row_and_expert
        matrix = lax.dynamic_index_in_dim(kernel_EDF, expert, 0, keepdims=False)
        return None, (row[None] @ matrix.astype(row.dtype))[0]

    flat = rows.reshape(-1, rows.shape[-1])
    experts = _known(routing, kernel_EDF).reshape(-1)
    _, out = lax.scan(step, None, (flat, experts))
    return out.reshape(*rows.shape[:-1], -1)


def multiply_gathered(rows: jax.Array, kernel_EDF: jax.Array, routing: Routing) -> jax.Array:
    """The same, all rows at once: for GPUs, where reading the matrices is part of the product."""
    matrices = kernel_EDF[_known(routing, kernel_EDF)]
    return jnp.einsum("btkd,btkdf->btkf", rows, matrices.astype(rows.dtype))


def of_experts(values_EF: jax.Array, routing: Routing) -> jax.Array:
    """Returns for each row what belongs to its expert."""
    return values_EF[_known(routing, values_EF)]


def collect(rows: jax.Array, routing: Routing) -> jax.Array:
    """Returns the sum of each token's rows that count, (B, T, D)."""
    return jnp.where(routing["members"][..., None], rows, 0).sum(2).astype(rows.dtype)


def _known(routing: Routing, values: Any) -> jax.Array:
    return jnp.minimum(routing["experts"], values.shape[0] - 1)
