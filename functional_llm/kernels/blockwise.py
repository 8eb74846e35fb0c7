"""Attention in blocks: memory grows with the tokens, and not with their square.

Scores exist for one block of queries and slots at a time, forward and backward. The mask is made
of positions within the block, and blocks in which nobody sees anything are skipped.

Shapes: as in `blocks.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from functional_llm.kernels.blocks import (
    Columns,
    Rows,
    Rule,
    Shared,
    block_scores,
    by_head,
    cut_columns,
    cut_rows,
    live_blocks,
    product,
)
from functional_llm.kernels.explicit import Scoring
from functional_llm.kernels.kept import ATTENDED
from functional_llm.kernels.mask import Mask

_LOWEST = -1e30  # a score; not -inf, of which differences are NaN

CarryT = TypeVar("CarryT")
Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # highest score, sum, weighted values


class Result(NamedTuple):
    """Of rows.

    Args:
        out: (B, K, Q, G, V); in the backward pass, its gradient.
        log_sums: (B, K, Q, G, 1), the logarithm of the softmax's divisor.
        inner: (B, K, Q, G, 1), the product of `out` and its gradient; before there is one, zeros.
    """

    out: jax.Array
    log_sums: jax.Array
    inner: jax.Array


RowResult: TypeAlias = tuple[Rows, Result]
RowSums: TypeAlias = tuple[jax.Array, jax.Array | None]  # gradients of queries and slopes
ColumnSums: TypeAlias = tuple[jax.Array, jax.Array]  # gradients of keys and values


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    mask: Mask,
    scoring: Scoring,
    sinks_N: jax.Array | None = None,
    slopes_N: jax.Array | None = None,
    *,
    block_queries: int | None = None,
    block_slots: int = 512,
    skips: bool | None = None,
    in_float32: bool | None = None,
) -> jax.Array:
    """Returns what `attend_explicitly` returns, and zeros for a query that sees no slot.

    Args:
        q_BTNH: Queries.
        k_BSKH: Keys.
        v_BSKV: Values.
        mask: Which slots each query sees.
        scoring: How scores are made.
        sinks_N: As for `attend_explicitly`.
        slopes_N: As for `attend_explicitly`.
        block_queries: Q. Defaults to 256 on CPUs, 512 elsewhere.
        block_slots: C.
        skips: Whether blocks that nobody sees are skipped. Defaults to CPUs: on GPUs the host would
            wait for each such decision.
        in_float32: Whether products are made of float32 numbers. Defaults to CPUs, on which XLA
            does not have, for all shapes, products of bfloat16 numbers with a float32 result.

    Reference:
        [FlashAttention-2](https://arxiv.org/abs/2307.08691), algorithms 1 and 2.
    """
    length, heads = q_BTNH.shape[1:3]
    slots, kv_heads = k_BSKH.shape[1:3]
    on_cpu = jax.default_backend() == "cpu"
    queries = min(block_queries or (256 if on_cpu else 512), length)
    columns = min(block_slots, slots)
    allowed = mask.mask
    if allowed is not None:
        # Of a constant mask, XLA would compute every part while it compiles.
        widths = [(0, 0), (0, -length % queries), (0, -slots % columns)]
        allowed = lax.optimization_barrier(jnp.pad(jnp.asarray(allowed), widths))
    sinks, slopes = (
        None if x is None else x.astype("float32").reshape(kv_heads, 1, -1, 1)
        for x in (sinks_N, slopes_N)
    )
    skips, in_float32 = (on_cpu if x is None else x for x in (skips, in_float32))
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    out_IBKQGV = _attend(
        Rule(scoring, mask.window, skips, in_float32, precision),
        cut_rows(q_BTNH, kv_heads, mask, queries),
        cut_columns(k_BSKH, v_BSKV, mask, columns),
        Shared(allowed, sinks, slopes),
    )
    out_BIQKGV = out_IBKQGV.transpose(1, 0, 3, 2, 4, 5)
    return out_BIQKGV.reshape(len(q_BTNH), -1, heads, v_BSKV.shape[3])[:, :length]


def _if(rule: Rule, live: jax.Array, step: Callable[[CarryT], CarryT], carry: CarryT) -> CarryT:
    if not rule.skips:
        return step(carry)
    result: CarryT = lax.cond(live, step, lambda same: same, carry)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, rows: Rows, columns: Columns, shared: Shared) -> jax.Array:
    return _forward(rule, rows, columns, shared)[0]


Saved: TypeAlias = tuple[Rows, Columns, Shared, Result]


def _forward(rule: Rule, rows: Rows, columns: Columns, shared: Shared) -> tuple[jax.Array, Saved]:
    """Returns the outputs (I, B, K, Q, G, V), and what the backward pass needs."""
    dtype = columns.value.dtype

    def of_row(_: None, row_and_live: tuple[Rows, jax.Array]) -> tuple[None, Result]:
        row, live_J = row_and_live

        def cell(sums: Sums, column_and_live: tuple[Columns, jax.Array]) -> tuple[Sums, None]:
            column, live = column_and_live

            def see(sums: Sums) -> Sums:
                highest, total, weighted = sums
                scores, _ = block_scores(rule, row, column, shared)
                now_highest = jnp.maximum(highest, scores.max(-1, keepdims=True))
                weights = jnp.exp(scores - now_highest)
                if not rule.in_float32:  # the divisor is the sum of what is multiplied
                    weights = weights.astype(dtype)
                fading = jnp.exp(highest - now_highest)
                total = total * fading + weights.astype("float32").sum(-1, keepdims=True)
                values = product(rule, "bkqgc,bkcv->bkqgv", weights, column.value)
                return now_highest, total, weighted * fading + values

            return _if(rule, live, see, sums), None

        one = jnp.zeros((*row.query.shape[:-1], 1), "float32")
        begin = one + _LOWEST, one
        if shared.sinks is not None:
            begin = one + shared.sinks, one + 1.0
        zeros = jnp.zeros((*row.query.shape[:-1], columns.value.shape[-1]), "float32")
        (highest, total, weighted), _ = lax.scan(cell, (*begin, zeros), (columns, live_J))
        total = jnp.maximum(total, 1e-30)  # of a query that sees nothing
        log_sums = highest + jnp.log(total)
        return None, Result((weighted / total).astype(dtype), log_sums, jnp.zeros_like(log_sums))

    _, result = lax.scan(of_row, None, (rows, live_blocks(rule, rows, columns, shared)))
    out, log_sums = (checkpoint_name(x, ATTENDED) for x in (result.out, result.log_sums))
    return out, (rows, columns, shared, result._replace(out=out, log_sums=log_sums))


def _backward(rule: Rule, saved: Saved, d_out: jax.Array) -> tuple[Rows, Columns, Shared]:
    """Two passes: along rows of blocks for the queries, along columns for keys and values."""
    rows, columns, shared, result = saved
    inner = (d_out.astype("float32") * result.out.astype("float32")).sum(-1, keepdims=True)
    live_IJ = live_blocks(rule, rows, columns, shared)
    all_rows = rows, Result(d_out, result.log_sums, inner)
    d_slopes = None if shared.slopes is None else jnp.zeros_like(shared.slopes)
    along_row = partial(_along_row, rule, shared, columns)
    d_slopes, d_query = lax.scan(along_row, d_slopes, (all_rows, live_IJ))
    along_column = partial(_along_column, rule, shared, all_rows)
    _, (d_key, d_value) = lax.scan(along_column, None, (columns, live_IJ.T))
    d_sinks = None
    if shared.sinks is not None:
        share = jnp.exp(shared.sinks - result.log_sums)
        d_sinks = -(share * inner).sum((0, 1, 3))[:, None]
    none: Any = None  # what integers and booleans have for a gradient
    return (
        Rows(none, d_query, none, none, none),
        Columns(none, d_key, d_value, none, none),
        Shared(none, d_sinks, d_slopes),
    )


def _along_row(
    rule: Rule,
    shared: Shared,
    columns: Columns,
    d_slopes: jax.Array | None,
    row_and_live: tuple[RowResult, jax.Array],
) -> tuple[jax.Array | None, jax.Array]:
    """Returns the slopes' gradient with what one row adds, and the gradient of its queries."""
    row_result, live_J = row_and_live
    row = row_result[0]

    def cell(carry: RowSums, column_and_live: tuple[Columns, jax.Array]) -> tuple[RowSums, None]:
        column, live = column_and_live

        def see(carry: RowSums) -> RowSums:
            d_query, d_slopes = carry
            _, d_products, d_scores = _gradients(rule, shared, row_result, column)
            d_query += product(rule, "bkqgc,bkch->bkqgh", d_products, column.key)
            if d_slopes is not None:
                distances = row.positions[:, :, None] - column.positions[:, None]
                by_distance = d_scores * by_head(distances.astype("float32"))
                d_slopes -= by_distance.sum((0, 2, 4))[:, None, :, None]
            return d_query, d_slopes

        return _if(rule, live, see, carry), None

    begin = jnp.zeros(row.query.shape, "float32"), d_slopes
    (d_query, d_slopes), _ = lax.scan(cell, begin, (columns, live_J))
    return d_slopes, d_query.astype(row.query.dtype)


def _along_column(
    rule: Rule,
    shared: Shared,
    rows: RowResult,
    _: None,
    column_and_live: tuple[Columns, jax.Array],
) -> tuple[None, ColumnSums]:
    """Returns the gradients of the keys and values of one column."""
    column, live_I = column_and_live

    def cell(
        carry: ColumnSums, row_and_live: tuple[RowResult, jax.Array]
    ) -> tuple[ColumnSums, None]:
        row_result, live = row_and_live

        def see(carry: ColumnSums) -> ColumnSums:
            d_key, d_value = carry
            weights, d_products, _ = _gradients(rule, shared, row_result, column)
            row, result = row_result
            d_key += product(rule, "bkqgc,bkqgh->bkch", d_products, row.query)
            return d_key, d_value + product(rule, "bkqgc,bkqgv->bkcv", weights, result.out)

        return _if(rule, live, see, carry), None

    begin = jnp.zeros(column.key.shape, "float32"), jnp.zeros(column.value.shape, "float32")
    (d_key, d_value), _ = lax.scan(cell, begin, (rows, live_I))
    return None, (d_key.astype(column.key.dtype), d_value.astype(column.value.dtype))


def _gradients(
    rule: Rule, shared: Shared, row_result: RowResult, column: Columns
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a block's weights, and the gradients of products and of scores."""
    row, (d_out, log_sums, inner) = row_result
    scores, slope = block_scores(rule, row, column, shared)
    weights = jnp.exp(scores - log_sums)
    d_scores = weights * (product(rule, "bkqgv,bkcv->bkqgc", d_out, column.value) - inner)
    d_products = d_scores * rule.scoring.scale
    d_products = d_products if slope is None else d_products * slope
    if not rule.in_float32:
        weights, d_products = (x.astype(row.query.dtype) for x in (weights, d_products))
    return weights, d_products, d_scores


_attend.defvjp(_forward, _backward)
