"""First values of adapters, made by NumPy and put on the device as they are.

JAX would compile a program for each shape, even in `ops.convert_to_tensor`, which takes more time
and memory than the weights.
"""

import zlib
from collections.abc import Callable

import jax
import numpy as np


def zeros(shape: tuple[int, ...], dtype: str | None = None) -> jax.Array:
    """An initializer."""
    return jax.device_put(np.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype: str | None = None) -> jax.Array:
    """An initializer."""
    return jax.device_put(np.ones(shape, dtype))


def uniform(bound: float, seed: int | None) -> Callable[..., jax.Array]:
    """Returns an initializer: numbers from -bound to bound.

    Args:
        bound: The largest.
        seed: Of the numbers; `None` for those that `keras.utils.set_random_seed` leads to.
    """

    def initialize(shape: tuple[int, ...], dtype: str | None = None) -> jax.Array:
        random = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
        return jax.device_put(random.uniform(-bound, bound, shape).astype(dtype))

    return initialize


def seed_for(path: str, seed: int | None) -> int | None:
    """Returns a seed for one layer; `None`, for another at every call, stays `None`."""
    return None if seed is None else (seed + zlib.crc32(path.encode())) % 2**31


def _singular(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _orthonormal(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    q, r = np.linalg.qr(matrix.T)  # PEFT decomposes (out, in), and does not divide by the scale
    return r[:rank].T, q[:, :rank].T


# Name -> two thin matrices, (in, rank) and (rank, out), that are a part of a matrix (in, out).
PARTS = {"pissa": _singular, "olora": _orthonormal}
