"""Products of groups of rows, each with a matrix of its own: the work of the experts that are used.

The rows lie group after group, without gaps; behind the last group are rows that belong to none.
A *tile* is a part of one group, of a height that is known when the program is made. A tile may
reach beyond its group: then it also computes rows of the next one, which that group's own tiles,
that come later, overwrite.

Shapes: S rows, E groups, D in, F out, H height of a tile, L tiles, C tiles of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

CarryT = TypeVar("CarryT")
_CHUNK_BYTES = 256 * 2**20  # of the matrices that exist twice at a time, on GPUs


class Rule(NamedTuple):
    """How groups are multiplied: known when a program is made.

    Args:
        name: "walk": tile after tile, as many as there are, which suits CPUs. "tiles": all tiles
            that there can be, many at a time, which suits GPUs, where a loop waits for the host.
        height: The largest H. So many rows of no group lie behind the last one.
        precision: Of products, as `jax.default_matmul_precision` is in the forward pass.
    """

    name: str
    height: int
    precision: str | None = None


class Groups(NamedTuple):
    """Where the groups are.

    Args:
        begins: (E,) int32, each group's first row.
        ends: (E,) int32, the row behind its last one.
    """

    begins: jax.Array
    ends: jax.Array


def multiply_groups(
    rows_SD: jax.Array, kernel_EDF: jax.Array, groups: Groups, name: str, height: int
) -> jax.Array:
    """Returns each row's product with the matrix of its group, (S, F), in the rows' dtype.

    What rows of no group get is finite, if they are. Their gradient must be zero.

    Args:
        rows_SD: Rows.
        kernel_EDF: Matrices, of any dtype; those of int8 have no gradient.
        groups: Of the rows.
        name: Of the `Rule`.
        height: Of the `Rule`.
    """
    config: Any = jax.config
    rule = Rule(name, height, config.jax_default_matmul_precision)
    return _multiply(rule, rows_SD, kernel_EDF, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(rule: Rule, rows: jax.Array, kernel: jax.Array, groups: Groups) -> jax.Array:
    return _PRODUCTS[rule.name](rule, rows, kernel, groups, False)


Saved = tuple[jax.Array, jax.Array, Groups]


def _forward(
    rule: Rule, rows: jax.Array, kernel: jax.Array, groups: Groups
) -> tuple[jax.Array, Saved]:
    return _multiply(rule, rows, kernel, groups), (rows, kernel, groups)


def _backward(rule: Rule, saved: Saved, d_out: jax.Array) -> tuple[Any, ...]:
    rows, kernel, groups = saved
    d_rows = _PRODUCTS[rule.name](rule, d_out, kernel, groups, True)
    d_kernel = None  # what integers have for a gradient
    if jnp.issubdtype(kernel.dtype, jnp.floating):
        d_kernel = _GRADIENTS[rule.name](rule, rows, d_out, groups).astype(kernel.dtype)
    return d_rows, d_kernel, Groups(None, None)  # type: ignore[arg-type]


_multiply.defvjp(_forward, _backward)


# Tile after tile.


def _heights(rule: Rule) -> list[int]:
    """Returns the heights of tiles, ascending."""
    return sorted({max(1, rule.height * quarter // 4) for quarter in (1, 2, 3, 4)})


def _walk_product(
    rule: Rule, rows: jax.Array, kernel: jax.Array, groups: Groups, transposed: bool
) -> jax.Array:
    contracted = 1 if transposed else 0

    def of_group(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(kernel, group, 0, keepdims=False).astype(rows.dtype)

        def of_tile(out: jax.Array, start: jax.Array, height: int) -> jax.Array:
            tile = lax.dynamic_slice_in_dim(rows, start, height)
            dimensions = (((1,), (contracted,)), ((), ()))
            product = lax.dot_general(tile, matrix, dimensions, precision=rule.precision)
            return lax.dynamic_update_slice_in_dim(out, product, start, 0)

        return _over_tiles(rule, groups, group, of_tile, out)

    width = kernel.shape[1] if transposed else kernel.shape[2]
    return _over_groups(groups, of_group, jnp.zeros((len(rows), width), rows.dtype))


def _walk_gradient(rule: Rule, rows: jax.Array, d_out: jax.Array, groups: Groups) -> jax.Array:
    """Returns the gradient of the matrices, (E, D, F), float32."""
    shape = rows.shape[1], d_out.shape[1]

    def of_group(group: jax.Array, d_kernel: jax.Array) -> jax.Array:
        def of_tile(total: jax.Array, start: jax.Array, height: int) -> jax.Array:
            x, d = (lax.dynamic_slice_in_dim(y, start, height) for y in (rows, d_out))
            own = start + jnp.arange(height) < groups.ends[group]
            d = jnp.where(own[:, None], d, jnp.zeros((), d.dtype))
            dimensions = (((0,), (0,)), ((), ()))
            precision, dtype = rule.precision, jnp.float32
            return total + lax.dot_general(
                x, d, dimensions, precision=precision, preferred_element_type=dtype
            )

        total = _over_tiles(rule, groups, group, of_tile, jnp.zeros(shape, "float32"))
        return lax.dynamic_update_index_in_dim(d_kernel, total, group, 0)

    return _over_groups(groups, of_group, jnp.zeros((len(groups.ends), *shape), "float32"))


def _over_groups(
    groups: Groups, step: Callable[[jax.Array, CarryT], CarryT], carry: CarryT
) -> CarryT:
    """Goes through the groups that have rows, in order."""
    is_empty = groups.ends == groups.begins
    order = jnp.argsort(is_empty, stable=True).astype("int32")
    result: CarryT = lax.fori_loop(
        0, jnp.sum(~is_empty), lambda i, carry: step(order[i], carry), carry
    )
    return result


def _over_tiles(
    rule: Rule,
    groups: Groups,
    group: jax.Array,
    step: Callable[[CarryT, jax.Array, int], CarryT],
    carry: CarryT,
) -> CarryT:
    """Goes through the tiles of a group: high ones, and one of a height that suits the rest.

    Each product costs as much as 60 more rows (a copy of the matrix, and Eigen's packing of it):
    with one height, groups of 64 rows take a third more time. `lax.switch` would copy the carry.
    """
    heights = _heights(rule)
    start, end = groups.begins[group], groups.ends[group]
    full, rest = jnp.divmod(end - start, rule.height)
    last = jnp.searchsorted(jnp.asarray(heights), rest)
    for i, height in reversed(list(enumerate(heights))):
        trips = ((rest > 0) & (last == i)).astype("int32")
        trips = trips + full if height == rule.height else trips

        def tile(j: jax.Array, carry: CarryT, start: Any = start, height: int = height) -> CarryT:
            return step(carry, start + j * height, height)

        carry = lax.fori_loop(0, trips, tile, carry)
        start = start + trips * height
    return carry


# All tiles, many at a time.


class _Tiles(NamedTuple):
    """All tiles that there can be.

    Args:
        groups: (L,) int32.
        rows: (L, H) int32, S for none.
        places: (S,) int32, where each row is among L * H; L * H for none.
    """

    groups: jax.Array
    rows: jax.Array
    places: jax.Array


def _cut(rule: Rule, num_rows: int, groups: Groups) -> _Tiles:
    height, num_groups = rule.height, len(groups.ends)
    most = (num_rows - height) // height + min(num_groups, num_rows - height)
    counts = -(-(groups.ends - groups.begins) // height)
    last = jnp.cumsum(counts)
    tile = jnp.arange(most)
    group = jnp.searchsorted(last, tile, side="right")
    known = jnp.minimum(group, num_groups - 1)
    start = groups.begins[known] + (tile - (last - counts)[known]) * height
    rows = start[:, None] + jnp.arange(height)
    own = (group < num_groups)[:, None] & (rows < groups.ends[known][:, None])
    row = jnp.arange(num_rows)
    of_row = jnp.searchsorted(groups.ends, row, side="right")
    known_row = jnp.minimum(of_row, num_groups - 1)
    inside = row - groups.begins[known_row]
    places = ((last - counts)[known_row] + inside // height) * height + inside % height
    places = jnp.where(of_row < num_groups, places, most * height)
    return _Tiles(known, jnp.where(own, rows, num_rows), places)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns entries along the first axis, zeros beyond the last one."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _in_chunks(
    step: Callable[[CarryT, Any], tuple[CarryT, Any]],
    carry: CarryT,
    tiles: Any,
    matrix_bytes: int,
) -> tuple[CarryT, Any]:
    """Runs a step for chunks of tiles, so that only some of their matrices exist at a time."""
    count = len(jax.tree.leaves(tiles)[0])
    chunks = max(1, -(-count * matrix_bytes // _CHUNK_BYTES))
    size = -(-count // chunks)
    missing = chunks * size - count

    def cut(x: jax.Array) -> jax.Array:
        # What is missing repeats the last tile's group, and has rows of no group.
        widths = [(0, missing), *[(0, 0)] * (x.ndim - 1)]
        padded = jnp.pad(x, widths, constant_values=0)
        return padded.reshape(chunks, size, *x.shape[1:])

    return lax.scan(step, carry, jax.tree.map(cut, tiles))


def _tile_product(
    rule: Rule, rows: jax.Array, kernel: jax.Array, groups: Groups, transposed: bool
) -> jax.Array:
    tiles = _cut(rule, len(rows), groups)
    equation = "chf,cdf->chd" if transposed else "chd,cdf->chf"

    def step(carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        group, x = chunk
        matrices = kernel[group].astype(rows.dtype)
        return None, jnp.einsum(equation, x, matrices, precision=rule.precision)

    size = kernel.shape[1] * kernel.shape[2] * rows.dtype.itemsize
    _, out = _in_chunks(step, None, (tiles.groups, _take(rows, tiles.rows)), size)
    return _take(out.reshape(-1, out.shape[-1]), tiles.places)


def _tile_gradient(rule: Rule, rows: jax.Array, d_out: jax.Array, groups: Groups) -> jax.Array:
    tiles = _cut(rule, len(rows), groups)
    shape = rows.shape[1], d_out.shape[1]

    def step(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        group, x, d = chunk
        products = jnp.einsum(
            "chd,chf->cdf", x, d, precision=rule.precision, preferred_element_type="float32"
        )
        return total.at[group].add(products), None

    begin = jnp.zeros((len(groups.ends), *shape), "float32")
    x, d = (_take(y, tiles.rows) for y in (rows, d_out))
    return _in_chunks(step, begin, (tiles.groups, x, d), 4 * shape[0] * shape[1])[0]


_PRODUCTS: dict[str, Callable[..., jax.Array]] = {"walk": _walk_product, "tiles": _tile_product}
_GRADIENTS: dict[str, Callable[..., jax.Array]] = {"walk": _walk_gradient, "tiles": _tile_gradient}
