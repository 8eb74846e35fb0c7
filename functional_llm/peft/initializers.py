"""First values of adapters, made by NumPy and put on the device as they are.

JAX would compile a program for each shape, which takes more time and memory than the weights; even
`ops.convert_to_tensor` does.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def zeros(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """An initializer."""
    return jax.device_put(np.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """An initializer."""
    return jax.device_put(np.ones(shape, dtype))


def uniform(bound: float, seed: int | None) -> Callable[..., Any]:
    """Returns an initializer: numbers from -bound to bound.

    Args:
        bound: The largest.
        seed: Of the numbers; `None` for those that `keras.utils.set_random_seed` leads to.
    """

    def make(shape: tuple[int, ...], dtype: Any = None) -> Any:
        random = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
        return jax.device_put(random.uniform(-bound, bound, shape).astype(dtype))

    return make
