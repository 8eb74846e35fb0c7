"""Numbers to integers: what quantising makes of a matrix, a piece at a time.

int8 has one scale for each output (absmax). int4 has for each group of inputs to an output the grid
`(integer - zero) * scale` with the smallest squares of errors. That its zero is an integer keeps
small numbers small: inputs that are hundreds of times as large as others have such weights, and
grids with any offset, with a sixth less of the squares, cost more perplexity (see the log). Kernels
hold `scale * (integer + 8) + offset` nevertheless: what a file has on such a grid stays on it.

Shapes: K inputs, N outputs, G numbers in a group, R groups.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functional_llm.formats.grid import Grid
from functional_llm.xla.rewriter import options_for_short_rows

# Shares of the range of a group that grids are tried for. One of all is what rounds no number off.
_SHARES = tuple(np.linspace(0.76, 1.04, 8).tolist())
_PIECE = 1 << 21  # numbers that are rounded at once: temporaries are a few times as many
_LEAST, _LARGEST = -8, 7  # of int4
_FARTHEST = 119  # a zero further out would make stock Keras leave int8
_Grids: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # errors, scales, zeros (R,)
_Fit: TypeAlias = Callable[[jax.Array], tuple[jax.Array, ...]]


def round_to_int8(matrix_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (K, N) and scales (N,): a number is about `integer / scale`."""
    integers_KN, scale_1N = _by_pieces(matrix_KN, matrix_KN.shape[0], _fit_int8)
    return integers_KN, scale_1N[0]


def round_to_int4(matrix_KN: np.ndarray, size: int) -> Grid:
    """Returns integers (K, N), scales and offsets (K / size, N).

    What llama.cpp has rounded to Q4_0 or Q4_1 in such groups comes out exactly.

    Args:
        matrix_KN: The matrix.
        size: Numbers of a group, which divides K.
    """
    return Grid(*_by_pieces(matrix_KN, size, _fit_offsets))


def round_to_int4_with_zeros(matrix_KN: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Returns integers from -8 to 7 (K, N), scales and int8 zeros (K / size, N)."""
    return _by_pieces(matrix_KN, size, _fit_zeros)


def _by_pieces(matrix_KN: np.ndarray, size: int, fit: _Fit) -> tuple[np.ndarray, ...]:
    """Returns what a function finds for the groups of each output, with the outputs last."""
    # Of equal sizes but for the last: each size is compiled.
    step = max(1, _PIECE // matrix_KN.shape[0])
    program, parts = _compiled(fit), []
    for start in range(0, matrix_KN.shape[1], step):
        piece_NK = jax.device_put(matrix_KN[:, start : start + step].T)
        parts.append([np.asarray(x) for x in program(piece_NK, size)])
    return tuple(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))


@cache
def _compiled(fit: _Fit) -> Callable[[jax.Array, int], tuple[jax.Array, ...]]:
    def run(x_NK: jax.Array, size: int) -> tuple[jax.Array, ...]:
        found = fit(x_NK.astype(jnp.float32).reshape(-1, size))
        return tuple(x.reshape(len(x_NK), -1).T for x in found)

    return jax.jit(run, static_argnums=1, compiler_options=options_for_short_rows())


def _fit_int8(x_RG: jax.Array) -> tuple[jax.Array, ...]:
    """Returns integers (R, G) and scales (R,) of groups."""
    scale = 127 / (jnp.abs(x_RG).max(1) + 1e-7)  # as Keras does
    return jnp.clip(jnp.round(x_RG * scale[:, None]), -127, 127).astype(jnp.int8), scale


def _fit_offsets(x_RG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns integers (R, G), scales and offsets (R,), float16, of groups."""
    integers, scale, zero = _fit_zeros(x_RG)
    scale = scale.astype(jnp.float16)
    offset = (_LEAST - zero.astype(x_RG.dtype)) * scale.astype(x_RG.dtype)
    low = x_RG.min(1)
    step = ((x_RG.max(1) - low) / (_LARGEST - _LEAST)).astype(jnp.float16)
    width, least = (x[:, None].astype(x_RG.dtype) for x in (step, low.astype(jnp.float16)))
    steps = jnp.round((x_RG - least) / jnp.where(width == 0, 1, width))
    error = jnp.abs(steps * width + least - x_RG)
    is_exact_R = (error <= 1e-6 * (jnp.abs(least) + jnp.abs(width))).all(1)  # as Q4_1 has it
    return (
        jnp.where(is_exact_R[:, None], steps.astype(jnp.int8) + jnp.int8(_LEAST), integers),
        jnp.where(is_exact_R, step, scale),
        jnp.where(is_exact_R, low, offset).astype(jnp.float16),
    )


def _fit_zeros(x_RG: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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

    def try_share(best: _Grids, share: jax.Array) -> tuple[_Grids, None]:
        scale = jnp.maximum((high - low) * share / (_LARGEST - _LEAST), 1e-8)
        middle = (low + high) / 2 / scale  # which shall be between the integers
        for zero in (jnp.floor(-0.5 - middle), jnp.ceil(-0.5 - middle)):
            best = try_grid(best, scale, jnp.clip(zero, -_FARTHEST, _FARTHEST), True)
        return best, None

    best = jnp.full_like(low, jnp.inf), jnp.ones_like(low), jnp.zeros_like(low)
    best = try_grid(best, extreme / _LEAST, jnp.zeros_like(low), False)
    (_, scale, zero), _ = jax.lax.scan(try_share, best, jnp.array(_SHARES, x_RG.dtype))
    return rounded(scale, zero).astype(jnp.int8), scale, zero.astype(jnp.int8)
