"""The product of one row with a matrix, as XLA compiles it best for CPUs.

Each number of the matrix is needed once, so reading it is what takes time. XLA's libraries arrange
it anew for each product, and so read at half of the memory's speed in bfloat16 and a third of it
in int8.

Here sums of a few terms each are written out. That is a loop without a reduction: XLA turns it into
vector instructions on all threads, in which bfloat16 and int8 become float32 on the way. What is
left are an eighth as many numbers or fewer, and a product with ones sums them up.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_SMALL = 1 << 14  # elements of a matrix that is not worth it
_ROWS = (jnp.float32, jnp.bfloat16, jnp.float16)
_MATRICES = (jnp.float32, jnp.bfloat16, jnp.int8)
# Terms of a sum that are far apart, each a stream from memory, which processors foresee for a few
# streams only; and next to each of them, the rows that follow. With 16 terms the sums of an int8
# matrix are a quarter of its bytes, those of a float32 one a sixteenth; with more, the others only
# take longer to compile, as does bfloat16 with more than eight.
_FAR, _NEAR, _NEAR_BFLOAT16 = 4, 4, 2
# Within one row of memory there is but one stream.
_TERMS_IN_A_ROW, _VECTOR = 36, 16
_USES = 12  # of the bits of bfloat16: above 15, XLA makes a copy of them first


def is_row_product(row: Any, matrix: Any, dimension_numbers: Any) -> bool:
    """Whether `row_product` is the way to compute a product.

    Args:
        row: Array, or its shape and dtype.
        matrix: Likewise.
        dimension_numbers: Of `lax.dot_general`.
    """
    (of_row, summed), (paired, _) = dimension_numbers
    if paired or not summed or row.dtype not in _ROWS or matrix.dtype not in _MATRICES:
        return False
    if row.size != math.prod(row.shape[axis] for axis in of_row) or matrix.size < _SMALL:
        return False
    count = len(summed)
    is_first = [*summed] == [*range(count)]
    is_last = [*summed] == [*range(matrix.ndim - count, matrix.ndim)]
    terms = math.prod(_far_and_near(row.size, matrix)) if is_first else _num_in_a_row(row.size)
    return (is_first or is_last) and terms > 2


@partial(jax.jit, static_argnames="dimension_numbers")
def row_product(row: Any, matrix: Any, dimension_numbers: Any) -> Any:
    """`lax.dot_general(row, matrix, dimension_numbers)`, in float32.

    Traced once for all products of the same shapes, for the layers of a model have hundreds.

    Args:
        row: Array with one axis that is not of size 1, or several if all are summed over.
        matrix: Array of float32, bfloat16 or int8; its first or its last axes are summed over.
        dimension_numbers: Which axes.
    """
    (of_row, summed), _ = dimension_numbers
    ones = [1] * (row.ndim - len(of_row))
    kept = [size for axis, size in enumerate(matrix.shape) if axis not in summed]
    row = row.astype("float32").transpose(*of_row, *set(range(row.ndim)) - {*of_row}).reshape(-1)
    if summed[0] == 0:
        result = _sum_rows(row, matrix.reshape(row.size, -1))
    else:
        result = _sum_columns(row, matrix.reshape(-1, row.size))
    return result.reshape(*ones, *kept)


def _sum_rows(row_K: Any, matrix_KN: Any) -> Any:
    far, near = _far_and_near(row_K.size, matrix_KN)
    row = row_K.reshape(far, -1, near, 1)
    matrix = matrix_KN.reshape(*row.shape[:3], -1)
    places = [(i, slice(None), j) for i in range(far) for j in range(near)]
    sums = _sum_products(row, matrix, places)
    return jnp.ones(len(sums)) @ sums


def _sum_columns(row_K: Any, matrix_NK: Any) -> Any:
    row = row_K.reshape(1, _num_in_a_row(row_K.size), -1)
    matrix = matrix_NK.reshape(-1, *row.shape[1:])
    sums = _sum_products(row, matrix, [(slice(None), i) for i in range(row.shape[1])])
    return sums @ jnp.ones(sums.shape[1])


def _far_and_near(size: int, matrix: Any) -> tuple[int, int]:
    """Returns how many rows far apart, and how many next to each of them, are summed up at once."""
    far = _divisor(size, _FAR)
    return far, _divisor(size // far, _NEAR_BFLOAT16 if matrix.dtype == jnp.bfloat16 else _NEAR)


def _num_in_a_row(size: int) -> int:
    """Returns how many numbers of one row of memory are summed up at once.

    What is left shall be whole vectors, where it can.
    """
    most = min(_TERMS_IN_A_ROW, size // _VECTOR)
    count = _divisor(size // _VECTOR, most) if size % _VECTOR == 0 else 1
    return count if count > 2 else _divisor(size, most)


def _divisor(size: int, most: int) -> int:
    return max((n for n in range(1, most + 1) if size % n == 0), default=1)


def _sum_products(row: Any, matrix: Any, places: list[Any]) -> Any:
    """Returns the sum of what is at these places of row and matrix, multiplied, in float32."""
    terms = []
    for first in range(0, len(places), _USES):
        row, bits = _bits(row, matrix)  # of the new row: of the same one, XLA would make them once
        terms += [row[x] * _as_float(bits[x]) for x in places[first : first + _USES]]
    return lax.optimization_barrier(sum(terms))


def _bits(row: Any, matrix: Any) -> tuple[Any, Any]:
    """Returns the row, and the bits of a bfloat16 matrix: XLA would convert that as a whole.

    It shall not know either that the matrix is the same in each run of a loop, or it would make a
    float32 copy of it before.
    """
    row, matrix = lax.optimization_barrier((row, matrix))
    if matrix.dtype == jnp.bfloat16:
        matrix = lax.bitcast_convert_type(matrix, "uint16")
    return row, matrix


def _as_float(x: Any) -> Any:
    """Numbers, or the bits of bfloat16, as float32."""
    if x.dtype != jnp.uint16:
        return x.astype("float32")
    return lax.bitcast_convert_type(x.astype("uint32") << 16, "float32")
