"""Numbers to integers: what quantising makes of a matrix, a piece at a time.

int8 has one scale for each output (absmax). int4 has a scale and a zero for each group of inputs to
an output, and stands for `(integer - zero) * scale`, as in Keras. That the zero is an integer keeps
a group's own least number off the grid, so the grid with the smallest squares of errors is looked
for: to round between least and largest number left a quarter more perplexity to lose (see the log).

Shapes: K inputs, N outputs, G numbers in a group, R groups.
"""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

# Shares of the range of a group that grids are tried for. One of all is what rounds no number off.
_SHARES = tuple(np.linspace(0.76, 1.04, 8).tolist())
# Integers that the number furthest from 0 may be in a grid without an offset. In Q4_0 it is -8;
# with an importance matrix 7, too.
_LEVELS = (-8.0, *map(float, range(7, 0, -1)))
_PIECE = 1 << 21  # numbers that are rounded at once: temporaries are a few times as many
_LEAST, _LARGEST = -8, 7  # of int4
_FARTHEST = 119  # a zero further out would make stock Keras leave int8
_Grids: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # errors, scales, zeros (R,)


def round_to_int8(matrix_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (K, N) and scales (N,): a number is about `integer / scale`."""
    integers = np.empty(matrix_KN.shape, np.int8)
    scales = np.empty(matrix_KN.shape[1], np.float32)
    for piece in _pieces(matrix_KN):
        part = np.asarray(matrix_KN[:, piece], np.float32)
        scales[piece] = 127 / (np.abs(part).max(axis=0) + 1e-7)  # as Keras does
        integers[:, piece] = np.clip(np.rint(part * scales[piece]), -127, 127)
    return integers, scales


def round_to_int4(matrix_KN: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns integers from -8 to 7 (K, N), scales and int8 zeros (K / size, N).

    What lies on such a grid, as blocks of Q4_0 in a GGUF file do, comes out exactly.

    Args:
        matrix_KN: The matrix.
        size: Numbers of a group, which divides K.
    """
    num_inputs, num_outputs = matrix_KN.shape
    integers = np.empty((num_inputs, num_outputs), np.int8)
    scales = np.empty((num_inputs // size, num_outputs), np.float32)
    zeros = np.empty(scales.shape, np.int8)
    for piece in _pieces(matrix_KN):
        part_CK = np.asarray(matrix_KN[:, piece], np.float32).T
        found = _fit_grids(np.ascontiguousarray(part_CK).reshape(-1, size))
        values, scale, zero = (np.asarray(x).reshape(len(part_CK), -1).T for x in found)
        integers[:, piece], scales[:, piece], zeros[:, piece] = values, scale, zero
    return integers, scales, zeros


def _pieces(matrix_KN: np.ndarray) -> list[slice]:
    """Returns slices of the outputs, of equal sizes but for the last: each size is compiled."""
    size = max(1, _PIECE // matrix_KN.shape[0])
    return [slice(i, i + size) for i in range(0, matrix_KN.shape[1], size)]


@jax.jit
def _fit_grids(x_RG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns integers (R, G), scales (R,) and zeros (R,) of groups."""
    low, high = x_RG.min(1), x_RG.max(1)
    extreme = jnp.where(-low > high, low, high)

    def rounded(scale_R: jax.Array, zero_R: jax.Array) -> jax.Array:
        scale = jnp.where(scale_R == 0, 1, scale_R)
        return jnp.clip(jnp.round(x_RG / scale[:, None]) + zero_R[:, None], _LEAST, _LARGEST)

    def try_grid(best: _Grids, scale_R: jax.Array, zero_R: jax.Array, refit: bool) -> _Grids:
        steps = rounded(scale_R, zero_R) - zero_R[:, None]
        if refit:  # the scale that suits these integers best
            square = (steps * steps).sum(1)
            scale_R = (steps * x_RG).sum(1) / jnp.where(square == 0, 1, square)
            scale_R = jnp.where(scale_R == 0, 1e-8, scale_R)
            steps = rounded(scale_R, zero_R) - zero_R[:, None]
        error = jnp.square(steps * scale_R[:, None] - x_RG).sum(1)
        better = error < best[0]
        new = (error, scale_R, zero_R)
        return jax.tree.map(partial(jnp.where, better), new, best)

    def try_level(best: _Grids, level: jax.Array) -> tuple[_Grids, None]:
        scale = extreme / level
        for one in (scale.astype(jnp.float16).astype(scale.dtype), scale):  # as in files; any
            best = try_grid(best, one, jnp.zeros_like(low), False)
        return best, None

    def try_share(best: _Grids, share: jax.Array) -> tuple[_Grids, None]:
        scale = jnp.maximum((high - low) * share / (_LARGEST - _LEAST), 1e-8)
        middle = (low + high) / 2 / scale  # which shall be between the integers
        for zero in (jnp.floor(-0.5 - middle), jnp.ceil(-0.5 - middle)):
            best = try_grid(best, scale, jnp.clip(zero, -_FARTHEST, _FARTHEST), True)
        return best, None

    best = jnp.full_like(low, jnp.inf), jnp.ones_like(low), jnp.zeros_like(low)
    best, _ = jax.lax.scan(try_level, best, jnp.array(_LEVELS, x_RG.dtype))
    (_, scale, zero), _ = jax.lax.scan(try_share, best, jnp.array(_SHARES, x_RG.dtype))
    return rounded(scale, zero).astype(jnp.int8), scale, zero.astype(jnp.int8)
