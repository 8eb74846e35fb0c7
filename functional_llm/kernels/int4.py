"""Products with int4 matrices, packed as stock Keras packs them.

A byte holds two neighbours of a matrix's last axis, the even one in its lower half. A number is
`scale * (integer + 8) + offset`, with a scale and an offset for each group of inputs, in float32;
in tables it is `(integer - zero) * scale`.

Shapes: ... any, K inputs, N outputs, M bytes for N outputs, G numbers in a group, R groups.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

_Matrix: TypeAlias = tuple[jax.Array, ...]  # packed integers, scales, offsets
# Rows that are multiplied one by one, each with a sum that is written out, on CPUs.
_FEW = 4
_LEAST = -8  # of the integers
_TERMS = 8


def dequantize_int4(packed_KM: jax.Array, scale_RN: jax.Array, offset_RN: jax.Array) -> jax.Array:
    """Returns the matrix (K, N), float32."""
    halves = zip(_unpacked(packed_KM), _halves(scale_RN), _halves(offset_RN), strict=True)
    even, odd = (_dequantized(*half) for half in halves)
    return _interleaved(even, odd, scale_RN.shape[1])


def look_up_int4(
    tokens: jax.Array, packed_VM: jax.Array, scale_VR: jax.Array, zero_VR: jax.Array
) -> jax.Array:
    """Returns rows (..., N) of a table whose rows are quantised in groups, in its scales' dtype."""
    packed, scale, zero = (jnp.take(x, tokens, axis=0) for x in (packed_VM, scale_VR, zero_VR))
    even, odd = _unpacked(packed)
    groups = _interleaved(even, odd, 2 * even.shape[-1]).reshape(*scale.shape, -1)
    rows = (groups - zero[..., None]).astype(scale.dtype) * scale[..., None]
    return rows.reshape(*tokens.shape, -1)


@jax.custom_vjp  # the gradient makes the matrix again, which would wait in memory otherwise
def multiply_int4(
    x_K: jax.Array, packed_KM: jax.Array, scale_RN: jax.Array, offset_RN: jax.Array
) -> jax.Array:
    """Returns the product of inputs (..., K) with an int4 matrix: (..., N), in the inputs' dtype.

    Args:
        x_K: Floats.
        packed_KM: int8.
        scale_RN: Floats. R divides K.
        offset_RN: Floats.
    """
    rows = math.prod(x_K.shape[:-1])
    if rows <= _FEW and jax.default_backend() == "cpu":
        halves = _halves(scale_RN), _halves(offset_RN)
        x_rows = x_K.reshape(rows, -1).astype(jnp.float32)
        even, odd = (
            jnp.stack([_sum_row(x, packed_KM, half, scale, offset) for x in x_rows])
            for half, scale, offset in zip(range(2), *halves, strict=True)
        )
    else:
        floats = _float_halves(x_K, packed_KM, scale_RN, offset_RN)
        even, odd = (jnp.matmul(x_K, half) for half in floats)
    product = _interleaved(even, odd, scale_RN.shape[1]).astype(x_K.dtype)
    return product.reshape(*x_K.shape[:-1], -1)


def _multiply_forward(x_K: jax.Array, *matrix: jax.Array) -> tuple[jax.Array, _Matrix]:
    return multiply_int4(x_K, *matrix), matrix


def _multiply_backward(
    matrix: _Matrix, gradient_N: jax.Array
) -> tuple[jax.Array, None, None, None]:
    halves = _halves(gradient_N.reshape(-1, gradient_N.shape[-1]))
    floats = _float_halves(gradient_N, *matrix)
    even, odd = (jnp.matmul(half, x_KM.T) for half, x_KM in zip(halves, floats, strict=True))
    return (even + odd).reshape(*gradient_N.shape[:-1], -1), None, None, None


multiply_int4.defvjp(_multiply_forward, _multiply_backward)


def _float_halves(
    x: jax.Array, packed_KM: jax.Array, scale_RN: jax.Array, offset_RN: jax.Array
) -> list[jax.Array]:
    """Returns the even and the odd columns of a matrix for a product with `x`, in its dtype.

    XLA makes for CPUs what depends on weights alone as early as it can, all float matrices of a
    model at once. So the integers depend on `x` here, by a zero that XLA does not know to be one.
    """
    if jax.default_backend() == "cpu":
        first = x[(0,) * x.ndim].astype(jnp.float32)
        bits = lax.bitcast_convert_type(first, jnp.int32) & jnp.int32(127)
        packed_KM = packed_KM + jnp.minimum(bits, jnp.int32(0)).astype(jnp.int8)
    halves = zip(_unpacked(packed_KM), _halves(scale_RN), _halves(offset_RN), strict=True)
    return [_dequantized(*half).astype(x.dtype) for half in halves]


def _unpacked(packed: jax.Array) -> list[jax.Array]:
    return [_number(packed, half) for half in range(2)]


def _number(packed: jax.Array, half: int) -> jax.Array:
    """Returns the even (half 0) or the odd numbers of packed ones, in the same integer type."""
    bits = jnp.iinfo(packed.dtype).bits
    left, right = (packed.dtype.type(x) for x in (bits - 8 + 4 * (1 - half), bits - 4))
    return lax.shift_right_arithmetic(lax.shift_left(packed, left), right)


def _halves(x_RN: jax.Array) -> list[jax.Array]:
    """Returns the even and the odd columns, as many of each."""
    padded = jnp.pad(x_RN, ((0, 0), (0, x_RN.shape[1] % 2)))
    return [padded[:, 0::2], padded[:, 1::2]]


def _interleaved(even: jax.Array, odd: jax.Array, size: int) -> jax.Array:
    """Returns an array of which these are the even and the odd numbers, `size` along the last."""
    both = jnp.stack([even, odd], axis=-1)
    return both.reshape(*even.shape[:-1], -1)[..., :size]


def _dequantized(half_KM: jax.Array, scale_RM: jax.Array, offset_RM: jax.Array) -> jax.Array:
    steps = half_KM.reshape(len(scale_RM), -1, half_KM.shape[1]) - jnp.int8(_LEAST)
    scale, offset = (x[:, None].astype(jnp.float32) for x in (scale_RM, offset_RM))
    return (steps.astype(jnp.float32) * scale + offset).reshape(half_KM.shape)


def _sum_row(
    x_K: jax.Array, packed_KM: jax.Array, half: int, scale_RM: jax.Array, offset_RM: jax.Array
) -> jax.Array:
    """Returns the product of one row with a half of a matrix, as XLA compiles it best for CPUs.

    As in `xla.matrix_vector`: sums of a few terms are written out, which gives a loop that unpacks
    on the way; a product with ones sums up what remains. More terms take minutes to compile.
    """
    num_groups, size = len(scale_RM), len(x_K) // len(scale_RM)
    count = max(n for n in range(1, _TERMS + 1) if size % n == 0)
    x, packed = lax.optimization_barrier((x_K, packed_KM))
    x = x.reshape(num_groups, -1, count, 1)
    packed = packed.reshape(*x.shape[:3], -1)
    sums = lax.optimization_barrier(
        sum(
            x[:, :, i] * _number(packed[:, :, i].astype(jnp.int32), half).astype(jnp.float32)
            for i in range(count)
        )
    )
    scale, offset = (x.astype(jnp.float32) for x in (scale_RM, offset_RM))
    shift = (offset - _LEAST * scale) * x.sum((1, 2))
    rows = [(sums * scale[:, None]).reshape(-1, scale.shape[1]), shift]
    return sum((jnp.ones((2, len(part))) @ part)[0] for part in rows)
