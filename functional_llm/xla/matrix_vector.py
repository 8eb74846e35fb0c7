"""The product of one row with a matrix, as XLA compiles it best for CPUs.

Each number of the matrix is needed once, so reading it is what takes time. XLA's libraries arrange
it anew for each product, and so read at half of the memory's speed in bfloat16 and a third of it
in int8.

Here sums of a few terms each are written out. That is a loop without a reduction: XLA turns it into
vector instructions on all threads, which convert bfloat16 and int8 to float32 on the way. An eighth
as many numbers or fewer remain, and a product with ones sums them up.

Shapes: K the numbers of the row, N the numbers of the result.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.xla.jax_private import Shaped
from functional_llm.xla.steps import Pair

Place: TypeAlias = tuple[slice, ...]

_SMALL = 1 << 14  # elements of a matrix that is too small to gain
_ROWS = (jnp.float32, jnp.bfloat16, jnp.float16)
_MATRICES = (jnp.float32, jnp.bfloat16, jnp.int8)
# Terms of a sum that are far apart, each a stream from memory, which processors foresee for a few
# streams only; and next to each of them, the rows that follow. In float32, 16 terms instead of
# eight decode 5 % faster and compile a fifth longer. bfloat16 is as fast with eight.
_FAR, _NEAR, _NEAR_BFLOAT16 = 4, 4, 2
# Within one row of memory there is but one stream.
_TERMS_IN_A_ROW, _VECTOR = 36, 16
_USES = 12  # of the bits of bfloat16: above 15, XLA makes a copy of them first


def is_matrix_vector(row: Shaped, matrix: Shaped, summed: Pair, paired: Pair) -> bool:
    """Whether `multiply_matrix_vector` can compute a product, and is worth it.

    Args:
        row: Left factor, an array or its shape and dtype.
        matrix: Right factor, likewise.
        summed: The axes of each that are summed over.
        paired: The axes of each that are paired.
    """
    of_row, of_matrix = summed
    if paired[0] or not of_matrix or row.dtype not in _ROWS or matrix.dtype not in _MATRICES:
        return False
    if row.size != math.prod(row.shape[axis] for axis in of_row) or matrix.size < _SMALL:
        return False
    count = len(of_matrix)
    is_first = of_matrix == tuple(range(count))
    is_last = of_matrix == tuple(range(matrix.ndim - count, matrix.ndim))
    terms = math.prod(_far_and_near(row.size, matrix)) if is_first else _num_in_a_row(row.size)
    return (is_first or is_last) and terms > 2


@partial(jax.jit, static_argnames="summed")
def multiply_matrix_vector(row: jax.Array, matrix: jax.Array, summed: Pair) -> jax.Array:
    """Returns the product of a row with a matrix, in float32.

    Traced once for all products of the same shapes, for the layers of a model have hundreds.

    Args:
        row: Array with one axis that is not of size 1, or several if all are summed over.
        matrix: Array of float32, bfloat16 or int8.
        summed: The axes of each that are summed over: of the matrix its first or its last ones.
    """
    of_row, of_matrix = summed
    ones = [1] * (row.ndim - len(of_row))
    kept = [size for axis, size in enumerate(matrix.shape) if axis not in of_matrix]
    row = row.astype(jnp.float32)
    row = row.transpose(*of_row, *set(range(row.ndim)) - {*of_row}).reshape(-1)
    if of_matrix[0] == 0:
        result = _sum_rows(row, matrix.reshape(row.size, -1))
    else:
        result = _sum_columns(row, matrix.reshape(-1, row.size))
    return result.reshape(*ones, *kept)


def _sum_rows(row_K: jax.Array, matrix_KN: jax.Array) -> jax.Array:
    far, near = _far_and_near(row_K.size, matrix_KN)
    row = row_K.reshape(far, -1, near, 1)
    matrix = matrix_KN.reshape(*row.shape[:3], -1)
    one = [slice(i, i + 1) for i in range(max(far, near))]
    places: list[Place] = [(i, slice(None), j) for i in one[:far] for j in one[:near]]
    sums = _sum_products(row, matrix, places).reshape(row.shape[1], -1)
    # With two rows it is a call of XLA's library. With one, XLA compiles a kernel for each product,
    # which takes as long as the kernel that makes the sums.
    return (jnp.ones((2, len(sums))) @ sums)[0]


def _sum_columns(row_K: jax.Array, matrix_NK: jax.Array) -> jax.Array:
    row = row_K.reshape(1, _num_in_a_row(row_K.size), -1)
    matrix = matrix_NK.reshape(-1, *row.shape[1:])
    places: list[Place] = [(slice(None), slice(i, i + 1)) for i in range(row.shape[1])]
    sums = _sum_products(row, matrix, places).reshape(len(matrix), -1)
    return sums @ jnp.ones(sums.shape[1])


def _far_and_near(size: int, matrix: Shaped) -> tuple[int, int]:
    """Returns how many rows far apart, and how many next to each of them, are summed up at once."""
    far = _divisor(size, _FAR)
    return far, _divisor(size // far, _NEAR_BFLOAT16 if matrix.dtype == jnp.bfloat16 else _NEAR)


def _num_in_a_row(size: int) -> int:
    """Returns how many numbers of one row of memory are summed up at once.

    What remains is whole vectors, where it can be.
    """
    most = min(_TERMS_IN_A_ROW, size // _VECTOR)
    count = _divisor(size // _VECTOR, most) if size % _VECTOR == 0 else 1
    return count if count > 2 else _divisor(size, most)


def _divisor(size: int, most: int) -> int:
    return max((n for n in range(1, most + 1) if size % n == 0), default=1)


def _sum_products(row: jax.Array, matrix: jax.Array, places: Sequence[Place]) -> jax.Array:
    """Returns the sum of what is at these places of row and matrix, multiplied, in float32."""
    terms = []
    for first in range(0, len(places), _USES):
        row, bits = _bits(row, matrix)  # of the new row: of the same one, XLA would make them once
        terms += [row[x] * _as_float(bits[x]) for x in places[first : first + _USES]]
    return lax.optimization_barrier(sum(terms))


def _bits(row: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the row, and the bits of a bfloat16 matrix: XLA would convert that as a whole.

    It shall not know either that the matrix is the same in each run of a loop, or it would make a
    float32 copy of it before.
    """
    row, matrix = lax.optimization_barrier((row, matrix))
    if matrix.dtype == jnp.bfloat16:
        matrix = lax.bitcast_convert_type(matrix, jnp.uint16)
    return row, matrix


def _as_float(x: jax.Array) -> jax.Array:
    """Numbers, or the bits of bfloat16, as float32."""
    if x.dtype != jnp.uint16:
        return x.astype(jnp.float32)
    return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
