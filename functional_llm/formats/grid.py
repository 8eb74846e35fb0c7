"""Matrices of 4-bit integers as files hold them, before anything is made floats.

Shapes: ... any, K inputs, R groups of `SIZE` inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

SIZE = 32  # numbers of a group, in all types of GGUF that have 4 bits and no table


@dataclass(frozen=True)
class Grid:
    """A matrix whose numbers are `scale * (integer + 8) + offset`.

    Args:
        integers: From -8 to 7, int8.
        scale: Of each group, float16; the axis of inputs is as many times shorter.
        offset: Of each group, float16.
    """

    integers: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    def map(self, move: Callable[[np.ndarray], np.ndarray]) -> "Grid":
        """Returns the grid with its numbers in other places; whole groups stay together."""
        return Grid(move(self.integers), move(self.scale), move(self.offset))

    def is_grouped(self, size: int) -> bool:
        """Whether these are groups of `size` inputs along the first of two axes, and int4."""
        rows, columns = self.integers.shape if self.integers.ndim == 2 else (0, 0)
        return rows % size == 0 and self.scale.shape == (rows // size, columns)


@runtime_checkable
class HasGrids(Protocol):
    """Tensors, some of which lie in a file as a `Grid`."""

    def read_grid(self, name: str) -> Grid | None:
        """Returns a tensor as its grid; `None` if it has none."""
