"""Changes of layout between a checkpoint's tensors and a model's variables."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

_TILE = 128  # rows and columns that are moved at once: they fit the second-level cache


@dataclass(frozen=True)
class Transform:
    """A change of layout of arrays, and its inverse.

    Args:
        forward: Tensor of a checkpoint -> value of a variable.
        inverse: The way back.
        axis: Axis along which the parts of a fused tensor lie; `None` for tensors in one part.
        groups: In how many equal pieces the axis falls, each of which holds a share of every part,
            in order: all queries, all keys and all values are one group; a query, a key and a value
            of each head are as many groups as heads.
        computes: Whether the numbers change, beside their places: they are read in float32 then.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    axis: int | None = None
    groups: int = 1
    computes: bool = False

    def split(self, array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns the values of the variables; `sizes` are those of the parts on the axis."""
        return [_in_order(part) for part in self.views(array, sizes)]

    def views(self, array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns the same without moving numbers, where that can be."""
        parts = [array] if self.axis is None else self.parts(array, sizes, self.axis)
        return [self.forward(part) for part in parts]

    def join(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the tensor of the variables' values."""
        parts = [self.inverse(array) for array in arrays]
        whole = parts[0] if self.axis is None else self.whole(parts, self.axis)
        return _in_order(whole)

    @property
    def swaps(self) -> bool:
        """Whether the last two axes of a tensor are those of the variable, swapped."""
        return self.inverse(np.broadcast_to(np.float32(0), (1, 2, 3))).shape[-1] == 2

    def parts(self, array: np.ndarray, sizes: Sequence[int], axis: int) -> list[np.ndarray]:
        """Returns the parts that lie along an axis, as they lie along this transform's own."""
        moved = np.moveaxis(array, axis, 0)
        grouped = moved.reshape(self.groups, -1, *moved.shape[1:])
        ends = np.cumsum([size // self.groups for size in sizes])[:-1]
        return [
            np.moveaxis(part.reshape(-1, *moved.shape[1:]), 0, axis)
            for part in np.split(grouped, ends, axis=1)
        ]

    def whole(self, parts: Iterable[np.ndarray], axis: int) -> np.ndarray:
        """Returns the array of parts along an axis: `parts` the other way round."""
        moved = [np.moveaxis(part, axis, 0) for part in parts]
        rest = moved[0].shape[1:]
        grouped = np.concatenate([part.reshape(self.groups, -1, *rest) for part in moved], axis=1)
        return np.moveaxis(grouped.reshape(-1, *rest), 0, axis)


def _in_order(array: np.ndarray) -> np.ndarray:
    """Returns the array in C order; transposed matrices tile by tile.

    NumPy copies a large one along its rows or its columns, at a fifth of the speed.
    """
    if array.ndim < 2 or array.strides[-2] >= array.strides[-1]:
        return np.asarray(array, order="C")  # not `ascontiguousarray`: a number stays one
    result = np.empty(array.shape, array.dtype)
    rows, columns = (range(0, size, _TILE) for size in array.shape[-2:])
    for index, row, column in product(np.ndindex(array.shape[:-2]), rows, columns):
        tile = *index, slice(row, row + _TILE), slice(column, column + _TILE)
        result[tile] = array[tile]
    return result


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transpose(array: np.ndarray) -> np.ndarray:
    """Returns the array with its last two axes swapped: of one matrix, or of one an expert."""
    return array.swapaxes(-1, -2)


TRANSFORMS = {
    "same": Transform(_same, _same),
    "transpose": Transform(_transpose, _transpose),
    # PyTorch's convolutions with a kernel for each channel: (out, 1, width).
    "depthwise": Transform(lambda x: x[:, 0].T, lambda x: x.T[:, None]),
    "last_axis": Transform(_same, _same, axis=-1),
    # llama.cpp's files of state space models have the number whose logarithm others have.
    "log_of_negative": Transform(lambda x: np.log(-x), lambda x: -np.exp(x), computes=True),
    # The same with a number for each head, on an axis more.
    "log_of_negatives": Transform(
        lambda x: np.log(-x[:, 0]), lambda x: -np.exp(x)[:, None], computes=True
    ),
}


# Tensor of a checkpoint, path of a variable, and the transform between them or its name.
Row: TypeAlias = tuple[str, str, str | Transform]
Rows: TypeAlias = Sequence[Row]


def split_axis(axis: int, sizes: tuple[int, ...]) -> Transform:
    """Returns the transform for tensors that have an axis of the variable as several axes.

    Args:
        axis: Of the variable, counted from the left.
        sizes: Of the tensor's axes in its place.
    """
    return Transform(
        lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + len(sizes) :]),
        lambda x: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]),
    )


def axis_added(axis: int) -> Transform:
    """Returns the transform for tensors that lack an axis of length one of the variable."""
    return Transform(lambda x: np.expand_dims(x, axis), lambda x: np.squeeze(x, axis))


def axis_removed(axis: int) -> Transform:
    """Returns the transform for tensors that have an axis of length one beside the variable's."""
    return Transform(lambda x: np.squeeze(x, axis), lambda x: np.expand_dims(x, axis))


def heads_first(heads: int, size: int) -> Transform:
    """Returns the transform of kernels (heads, in, size), of which the variable is (in, out)."""
    return Transform(
        lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1),
        lambda x: x.reshape(-1, heads, size).swapaxes(0, 1),
    )


def transposed(other: Transform) -> Transform:
    """Returns another transform for tensors with their last two axes swapped."""
    return Transform(lambda x: other.forward(_transpose(x)), lambda x: _transpose(other.inverse(x)))


def fused(groups: int = 1) -> tuple[Transform, Transform]:
    """Returns the transforms of weight and bias of a Linear that is several Dense in one.

    Of experts in one tensor (E, out, in) and their biases (E, out), too.

    Args:
        groups: As in `Transform`.
    """
    return (
        Transform(_transpose, _transpose, axis=-2, groups=groups),
        Transform(_same, _same, axis=-1, groups=groups),
    )


def by_turns(size: int) -> Transform:
    """Returns the transform of tensors whose last axis has a column of each part by turns.

    Args:
        size: How many columns a part has.
    """
    return Transform(_same, _same, axis=-1, groups=size)
