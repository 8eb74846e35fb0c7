"""What rules look at: the steps of a program, and the products among them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from functional_llm.xla.axis_order import Axes, Reordered, Value, in_program_order
from functional_llm.xla.jax_private import (
    Equation,
    Params,
    Shaped,
    apply,
    convert_element_type_p,
    dot_general_p,
    shape_of,
    transpose_p,
)

Pair: TypeAlias = tuple[Axes, Axes]  # axes of the left and of the right factor


@dataclass(frozen=True)
class Source:
    """The matrix that another one was made of.

    Args:
        matrix: In its own dtype and order of axes.
        is_transposed: Whether the other one is its transpose.
    """

    matrix: jax.Array
    is_transposed: bool = False


@dataclass(frozen=True)
class Step:
    """An equation of a program, and what it computes on.

    Args:
        equation: The equation.
        inputs: Its inputs.
        sources: For each input the matrix that it was made of, if it was.
    """

    equation: Equation
    inputs: Sequence[Value]
    sources: Sequence[Source | None]

    @property
    def shapes(self) -> list[Shaped]:
        """The shapes and dtypes of the inputs, as the program says."""
        return [shape_of(x) for x in self.equation.invars]

    @property
    def has_reordered(self) -> bool:
        """Whether the axes of an input are in another order than the program says."""
        return any(isinstance(x, Reordered) for x in self.inputs)

    @property
    def arrays(self) -> list[jax.Array]:
        """The inputs, each as the program says."""
        return [in_program_order(x) for x in self.inputs]

    def in_program_order(self) -> "Step":
        """Returns the step with its inputs as the program says."""
        return replace(self, inputs=self.arrays)

    def result_source(self) -> Source | None:
        """Returns the matrix that the result is made of: by a transpose, or from int8."""
        is_transpose = self.equation.primitive is transpose_p
        is_conversion = self.equation.primitive is convert_element_type_p
        if not (is_transpose or is_conversion) or self.shapes[0].ndim != 2:
            return None
        if is_conversion and self.shapes[0].dtype != jnp.int8:
            return None
        source = self.sources[0] or Source(in_program_order(self.inputs[0]))
        return replace(source, is_transposed=source.is_transposed ^ is_transpose)


@dataclass(frozen=True)
class Product:
    """What `lax.dot_general` computes.

    Args:
        left: Left factor.
        right: Right factor.
        summed: The axes that are summed over.
        paired: The axes that are paired: the result's first ones.
        params: The other parameters of `dot_general`.
        source: The matrix that the right factor was made of, if it was.
    """

    left: jax.Array
    right: jax.Array
    summed: Pair
    paired: Pair
    params: Params
    source: Source | None = None

    @classmethod
    def of_step(cls, step: Step) -> "Product":
        """Returns what a step `dot_general` computes."""
        params = dict(step.equation.params)
        (in_left, in_right), (of_left, of_right) = params.pop("dimension_numbers")
        left, right = step.arrays
        summed, paired = (tuple(in_left), tuple(in_right)), (tuple(of_left), tuple(of_right))
        return cls(left, right, summed, paired, params, step.sources[1])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the result."""
        return self.params["preferred_element_type"] or self.left.dtype

    @property
    def kept(self) -> Pair:
        """The axes that are neither summed over nor paired: the result's last ones."""
        return (
            kept_axes(self.left.ndim, self.summed[0], self.paired[0]),
            kept_axes(self.right.ndim, self.summed[1], self.paired[1]),
        )

    @property
    def num_rows(self) -> int:
        """How many numbers of the left factor meet each of the right one, for each pair."""
        return int(np.prod([self.left.shape[axis] for axis in self.kept[0]], dtype=int))

    def with_sums_in(self, dtype: str) -> "Product":
        """Returns the product with its sums, and its result, in this dtype."""
        return replace(self, params={**self.params, "preferred_element_type": jnp.dtype(dtype)})

    def of_source(self) -> "Product":
        """Returns the product with the matrix that the right factor was made of."""
        if self.source is None:
            return self
        summed, paired = self.summed[1], self.paired[1]
        if self.source.is_transposed:
            summed, paired = (tuple(1 - axis for axis in axes) for axes in (summed, paired))
        return replace(
            self,
            right=self.source.matrix,
            summed=(self.summed[0], summed),
            paired=(self.paired[0], paired),
            source=None,
        )

    def swapped(self) -> "Product":
        """Returns the product of the right factor with the left one."""
        return Product(self.right, self.left, self.summed[::-1], self.paired[::-1], self.params)

    def from_swapped(self, result: jax.Array) -> jax.Array:
        """Returns the result of this product, given that of the swapped one."""
        first, count = len(self.paired[0]), len(self.kept[1])
        return jnp.moveaxis(result, range(first, first + count), range(-count, 0))

    def compute(self) -> jax.Array:
        """Computes the product as it is."""
        numbers = (self.summed, self.paired)
        return apply(dot_general_p, self.left, self.right, dimension_numbers=numbers, **self.params)


def kept_axes(num_axes: int, summed: Sequence[int], paired: Sequence[int]) -> Axes:
    """Returns the axes of a factor that are neither summed over nor paired."""
    return tuple(axis for axis in range(num_axes) if axis not in (*summed, *paired))
