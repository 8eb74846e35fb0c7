"""The product of one row with a matrix, as XLA compiles it best for CPUs.

Each number of the matrix is needed once, so reading it is what takes time. XLA's libraries arrange
it anew for each product, and so read at half of the memory's speed in bfloat16 and a third of it
in int8.

Here sums of a few terms each are written out. That is a loop without a reduction: XLA turns it into
vector instructions on all threads, in which bfloat16 and int8 become float32 on the way. What is
left are an eighth as many numbers, and a product with ones sums them up.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

_SMALL = 1 << 14  # elements of a matrix that is not worth it
_ROWS = (jnp.float32, jnp.bfloat16, jnp.float16)
_MATRICES = (jnp.float32, jnp.bfloat16, jnp.int8)
# Terms of a sum. Each is a stream from memory, which processors foresee for some streams only, in
# pages of their own. Within one row of memory there is but one stream, so there may be more terms;
# above 15, XLA makes a copy of bfloat16's bits first.
_TERMS_OF_ROWS, _TERMS_IN_A_ROW = 8, 12


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
    return (is_first or is_last) and _num_terms(row.size, not is_first) > 2


def row_product(row: Any, matrix: Any, dimension_numbers: Any) -> Any:
    """`lax.dot_general(row, matrix, dimension_numbers)`, in float32.

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
    count = _num_terms(row_K.size, is_last=False)
    # Far apart, each of them in order: row i of the first eighth, of the second, ...
    row = row_K.reshape(count, -1, 1)
    row, bits = _bits(row, matrix_KN.reshape(count, row.shape[1], -1))
    sums = lax.optimization_barrier(sum(row[i] * _as_float(bits[i]) for i in range(count)))
    return jnp.ones(len(sums)) @ sums


def _sum_columns(row_K: Any, matrix_NK: Any) -> Any:
    count = _num_terms(row_K.size, is_last=True)
    row = row_K.reshape(1, count, -1)
    row, bits = _bits(row, matrix_NK.reshape(-1, count, row.shape[2]))
    sums = lax.optimization_barrier(sum(row[:, i] * _as_float(bits[:, i]) for i in range(count)))
    return sums @ jnp.ones(sums.shape[1])


def _num_terms(size: int, is_last: bool) -> int:
    """Returns how many terms are summed up at once: a divisor of their number."""
    most = _TERMS_IN_A_ROW if is_last else _TERMS_OF_ROWS
    return max(count for count in range(1, most + 1) if size % count == 0)


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
