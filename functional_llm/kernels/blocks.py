"""Blocks of queries and of slots: how they are cut, and the scores of one pair of them.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, G = N / K queries
per key head, H head size of queries and keys, V that of values; I blocks of Q queries, J blocks of
C slots.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.kernels.explicit import Scoring
from functional_llm.kernels.mask import Mask

_FAR = 1 << 30  # a position


@dataclass(frozen=True)
class Rule:
    """What is known when a program is made.

    Args:
        scoring: How scores are made.
        window: As in `Mask`.
        skips: Whether blocks that nobody sees are skipped.
        in_float32: Whether products are made of float32 numbers.
        precision: Of the products, as `jax.lax.dot` takes it: gradients are traced when the forward
            pass's setting may be gone.
    """

    scoring: Scoring
    window: int | None
    skips: bool
    in_float32: bool
    precision: str | None


class Rows(NamedTuple):
    """Queries, in blocks along a first axis I, or one block of them.

    Args:
        number: () int32, of the block.
        query: (B, K, Q, G, H).
        positions: (B, Q) int32.
        segments: (B, Q) int32, or `None`.
        firsts: (B, Q) int32, the positions from which on they see, or `None`.
    """

    number: jax.Array
    query: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    firsts: jax.Array | None


class Columns(NamedTuple):
    """Slots, in blocks along a first axis J, or one block of them.

    Args:
        number: () int32, of the block.
        key: (B, K, C, H).
        value: (B, K, C, V).
        positions: (B, C) int32.
        segments: (B, C) int32, or `None`.
    """

    number: jax.Array
    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segments: jax.Array | None


class Shared(NamedTuple):
    """What is for all blocks.

    Args:
        mask: (B, I * Q, J * C) boolean, or `None`.
        sinks: (K, 1, G, 1), or `None`.
        slopes: (K, 1, G, 1), or `None`.
    """

    mask: jax.Array | None
    sinks: jax.Array | None
    slopes: jax.Array | None


def cut_rows(q_BTNH: jax.Array, kv_heads: int, mask: Mask, size: int) -> Rows:
    """Returns the queries in blocks of `size`."""
    batch, length, heads, head_dim = q_BTNH.shape
    q_IBQKGH = cut(q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim), size)
    positions = mask.query_positions
    return Rows(
        jnp.arange(len(q_IBQKGH), dtype="int32"),
        q_IBQKGH.swapaxes(2, 3),
        # Without positions, a token sees all that is not behind the end of the last block.
        cut(jnp.zeros((batch, length), "int32") if positions is None else positions, size, -1),
        None if mask.segment_ids is None else cut(mask.segment_ids, size),
        None if mask.first_positions is None else cut(mask.first_positions, size),
    )


def cut_columns(k_BSKH: jax.Array, v_BSKV: jax.Array, mask: Mask, size: int) -> Columns:
    """Returns the slots in blocks of `size`."""
    k_JBKCH, v_JBKCV = (cut(x, size).swapaxes(2, 3) for x in (k_BSKH, v_BSKV))
    positions = mask.slot_positions
    return Columns(
        jnp.arange(len(k_JBKCH), dtype="int32"),
        k_JBKCH,
        v_JBKCV,
        cut(jnp.zeros(k_BSKH.shape[:2], "int32") if positions is None else positions, size, -1),
        None if mask.segment_ids is None else cut(mask.segment_ids, size),
    )


def cut(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """Returns the second axis in blocks, the last padded: (B, L, ...) -> (L/size, B, size, ...)."""
    widths = [(0, -x.shape[1] % size) if axis == 1 else (0, 0) for axis in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def live_blocks(rule: Rule, rows: Rows, columns: Columns, shared: Shared) -> jax.Array:
    """Returns in which blocks a query may see a slot, (I, J)."""

    def ends(x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_token = positions >= 0
        lowest = jnp.where(is_token, x, jnp.int32(_FAR)).min(2)
        return lowest, jnp.where(is_token, x, jnp.int32(-_FAR)).max(2)

    def pairs(of_row: jax.Array, of_column: jax.Array) -> jax.Array:
        return of_row[:, None] <= of_column[None]

    first_query, last_query = ends(rows.positions, rows.positions)
    first_slot, last_slot = ends(columns.positions, columns.positions)
    live_IJB = ~pairs(last_query + 1, first_slot)
    if rule.window is not None:
        live_IJB &= pairs(first_query - (rule.window - 1), last_slot)
    if rows.firsts is not None:
        live_IJB &= pairs(ends(rows.firsts, rows.positions)[0], last_slot)
    if rows.segments is not None and columns.segments is not None:
        first_of_row, last_of_row = ends(rows.segments, rows.positions)
        first_of_column, last_of_column = ends(columns.segments, columns.positions)
        live_IJB &= pairs(first_of_row, last_of_column) & ~pairs(last_of_row + 1, first_of_column)
    live_IJ = live_IJB.any(2)
    if shared.mask is not None:
        num_rows, num_columns = live_IJ.shape
        blocks = shared.mask.reshape(
            shared.mask.shape[0], num_rows, -1, num_columns, columns.key.shape[3]
        )
        live_IJ &= blocks.any((0, 2, 4))
    return live_IJ


def product(rule: Rule, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns an einsum in float32."""
    if rule.in_float32:
        x, y = x.astype("float32"), y.astype("float32")
    precision = rule.precision
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type="float32")


def block_scores(
    rule: Rule, row: Rows, column: Columns, shared: Shared
) -> tuple[jax.Array, jax.Array | None]:
    """Returns a block's scores (B, K, Q, G, C), -inf if unseen, and the slope of the soft cap."""
    scores = product(rule, "bkqgh,bkch->bkqgc", row.query, column.key) * rule.scoring.scale
    slope = None
    if rule.scoring.soft_cap is not None:
        share = jnp.tanh(scores / rule.scoring.soft_cap)
        scores, slope = share * rule.scoring.soft_cap, 1.0 - share * share
    distances = row.positions[:, :, None] - column.positions[:, None]
    if shared.slopes is not None:
        scores -= shared.slopes * by_head(distances.astype("float32"))
    seen = (column.positions >= 0)[:, None] & (distances >= 0)
    if rule.window is not None:
        seen &= distances < rule.window
    if row.firsts is not None:
        seen &= column.positions[:, None] >= row.firsts[:, :, None]
    if row.segments is not None and column.segments is not None:
        seen &= row.segments[:, :, None] == column.segments[:, None]
    if shared.mask is not None:
        sizes = seen.shape
        begin = (jnp.int32(0), row.number * sizes[1], column.number * sizes[2])
        seen &= lax.dynamic_slice(shared.mask, begin, sizes)
    return jnp.where(by_head(seen), scores, -jnp.inf), slope


def by_head(x_BQC: jax.Array) -> jax.Array:
    """Returns (B, 1, Q, 1, C), for all heads."""
    return x_BQC[:, None, :, None]
