"""Arrays whose axes lie in another order in memory than the program says.

A product that pairs an inner axis of a large array, such as the heads of a cache (B, S, K, H),
wants the paired axes first: (B, K, S, H). XLA transposes the whole array for it, each time. A loop
had better carry the array in that order. All else that a program does with it, writing or reading a
row, can be said of the other order too, without moving a number. The price is memory: while such a
loop runs, its arguments and results stand beside what it carries.

Shapes: B batch, S slots, K heads, H head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functional_llm.xla.jax_private import (
    Equation,
    Literal,
    OpenProgram,
    Params,
    Shaped,
    Variable,
    dot_general_p,
    inner_program,
    jit_p,
    scatter_p,
    shape_of,
)

HALF = (jnp.bfloat16, jnp.float16)
Axes: TypeAlias = tuple[int, ...]
_FEW = 64  # rows of the other factor, for each of the paired axes


@dataclass(frozen=True)
class Reordered:
    """An array of the program in another order: axis i of `array` is axis `order[i]` of that.

    On CPUs half floats are held as their bits: to write some, XLA would convert all to float32.
    """

    array: jax.Array
    order: Axes
    dtype: np.dtype

    @property
    def program_shape(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype that the program says."""
        sizes = sorted(zip(self.order, self.array.shape, strict=True))
        return jax.ShapeDtypeStruct([size for _, size in sizes], self.dtype)

    @property
    def is_bits(self) -> bool:
        """Whether the array holds the bits of half floats."""
        return bool(self.array.dtype != self.dtype)

    @property
    def numbers(self) -> jax.Array:
        """The array in its dtype."""
        return lax.bitcast_convert_type(self.array, self.dtype) if self.is_bits else self.array

    def places(self, axes: Sequence[int]) -> Axes:
        """Returns where these axes of the program are in the array."""
        return tuple(self.order.index(axis) for axis in axes)

    def keeps_order(self, axes: Sequence[int]) -> bool:
        """Whether these axes follow one another as the program says."""
        places = self.places(sorted(axes))
        return list(places) == sorted(places)


Value: TypeAlias = jax.Array | Reordered


def reorder(value: Value, order: Axes, as_bits: bool = True) -> Reordered:
    """Returns a value, in whatever order it is, in this order of axes; half floats as bits."""
    if isinstance(value, Reordered) and value.order == order:
        return value
    array = in_program_order(value)
    turned = jnp.transpose(array, order)
    return Reordered(_bits(turned) if as_bits else turned, order, array.dtype)


def in_program_order(value: Value) -> jax.Array:
    """Returns an array with its axes as the program says, whatever order they are in."""
    if not isinstance(value, Reordered):
        return value
    return jnp.transpose(value.numbers, np.argsort(value.order).tolist())


def loop_form(value: Reordered) -> jax.Array:
    """Returns the array as a loop carries it: without its first axes, as long as they have size 1.

    Products have no such axes in XLA. If the array had them where it is written and not where it is
    read, XLA would copy it.
    """
    return value.array.reshape(value.array.shape[_num_ones(value) :])


def from_loop_form(array: jax.Array, order: Axes, like: Shaped) -> Reordered:
    """Returns the value of which `loop_form` made an array.

    Args:
        array: What the loop carries.
        order: Order of the axes.
        like: The array of the program, or its shape and dtype.
    """
    return Reordered(array.reshape([like.shape[axis] for axis in order]), order, like.dtype)


def _num_ones(value: Reordered) -> int:
    """Returns how many of the first axes are left out, where an array is carried or written.

    None of bits: the product reads what is made of them, not the array that is written.
    """
    if value.is_bits:
        return 0
    return next((i for i, size in enumerate(value.array.shape) if size != 1), value.array.ndim)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype in HALF else x


def wanted_orders(program: OpenProgram, summed_first: bool = True) -> list[Axes | None]:
    """Returns the order that products want of each input of a program, if it is not its own.

    Args:
        program: The program.
        summed_first: Whether, behind the axes that are paired, those summed over come first. Else
            the others stay as they are: a row of them is written in one piece.
    """
    orders, _ = _look(program, summed_first)
    return [orders.get(variable) for variable in program.invars]


def _look(
    program: OpenProgram, summed_first: bool
) -> tuple[dict[Variable | None, Axes], dict[Variable, Variable | None]]:
    """Returns input -> order, and variable -> the input that it is, but for some rows."""
    origins: dict[Variable, Variable | None] = {variable: variable for variable in program.invars}
    orders: dict[Variable | None, Axes] = {}
    for equation in program.eqns:
        inputs = [None if isinstance(x, Literal) else origins.get(x) for x in equation.invars]
        if equation.primitive is scatter_p:
            origins[equation.outvars[0]] = inputs[0]
        elif equation.primitive is jit_p:
            inner = inner_program(equation).jaxpr
            found, sources = _look(inner, summed_first)
            outer: dict[Variable | None, Variable | None] = dict(
                zip(inner.invars, inputs, strict=True)
            )
            for variable, order in found.items():
                orders.setdefault(outer[variable], order)
            for result, inner_result in zip(equation.outvars, inner.outvars, strict=True):
                is_literal = isinstance(inner_result, Literal)
                origins[result] = outer.get(None if is_literal else sources.get(inner_result))
        elif equation.primitive is dot_general_p:
            for which in (0, 1):
                wanted = _wanted_order(equation, which, summed_first)
                if wanted is not None:
                    orders.setdefault(inputs[which], wanted)
    orders.pop(None, None)
    return orders, origins


def _wanted_order(equation: Equation, which: int, summed_first: bool) -> Axes | None:
    """Returns the order of a factor: the axes that are paired, then the others."""
    contracting, batch = equation.params["dimension_numbers"]
    factor, other = (shape_of(equation.invars[i]) for i in (which, 1 - which))
    paired = batch[which]
    if list(paired) == list(range(len(paired))) or factor.size <= other.size:
        return None
    taken = [*batch[1 - which], *contracting[1 - which]]
    if math.prod(n for axis, n in enumerate(other.shape) if axis not in taken) > _FEW:
        return None
    summed = contracting[which] if summed_first else ()
    others = (axis for axis in range(factor.ndim) if axis not in (*paired, *summed))
    return (*paired, *summed, *others)


def reordered_gather(operand: Reordered, params: Params) -> Params | None:
    """Returns the parameters with which `gather` gives the same; `None` if there are none."""
    numbers = params["dimension_numbers"]
    fixed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offsets = [axis for axis in range(len(operand.order)) if axis not in fixed]
    paired = operand.places(numbers.operand_batching_dims)
    if not operand.keeps_order(offsets) or list(paired) != sorted(paired):
        return None
    numbers = numbers._replace(
        collapsed_slice_dims=tuple(sorted(operand.places(numbers.collapsed_slice_dims))),
        start_index_map=operand.places(numbers.start_index_map),
        operand_batching_dims=paired,
    )
    sizes = tuple(params["slice_sizes"][axis] for axis in operand.order)
    return {**params, "dimension_numbers": numbers, "slice_sizes": sizes}


def writes_rows(operand: Shaped, updates: Shaped, params: Params) -> bool:
    """Whether a `scatter` writes whole rows, one for each of its indices.

    Args:
        operand: What it writes to, as the program says.
        updates: What it writes.
        params: Its parameters.
    """
    numbers = params["dimension_numbers"]
    kept = [axis for axis in range(operand.ndim) if axis not in numbers.inserted_window_dims]
    behind = tuple(range(updates.ndim - len(kept), updates.ndim))
    return (
        not numbers.operand_batching_dims
        and params["mode"] is not lax.GatherScatterMode.CLIP
        and set(numbers.scatter_dims_to_operand_dims) == set(numbers.inserted_window_dims)
        and numbers.update_window_dims == behind
        and [updates.shape[axis] for axis in behind] == [operand.shape[axis] for axis in kept]
    )


def write_rows(
    operand: Reordered, indices: jax.Array, updates: jax.Array, params: Params
) -> Reordered:
    """Does what a `scatter` that `writes_rows` does, one row after the other.

    XLA transposes an array that is not written along its first axes, and converts one in half
    precision to float32; not so if it writes slices.
    """
    written, indices, rows = _rows(operand, indices, updates, params)
    shape = [
        1 if axis in written else n
        for axis, n in zip(operand.order, operand.array.shape, strict=True)
    ]
    limits = [operand.array.shape[place] for place in operand.places(written)]
    columns = zip(indices.T, limits, strict=True)
    # Not `jnp.all`: a reduction is a kernel of its own on GPUs.
    is_inside = reduce(and_, [(column >= 0) & (column < limit) for column, limit in columns])
    ones = _num_ones(operand)
    zero = jnp.int32(0)  # all of one type, with 64 bits switched on too

    def write(i: jax.Array | int, array: jax.Array) -> jax.Array:
        index = lax.dynamic_index_in_dim(indices, i, keepdims=False)
        row = lax.dynamic_index_in_dim(rows, i, keepdims=False).reshape(shape[ones:])
        starts = [index[written.index(a)] if a in written else zero for a in operand.order]
        old = lax.dynamic_slice(array, starts[ones:], row.shape)
        new = jnp.where(lax.dynamic_index_in_dim(is_inside, i, keepdims=False), row, old)
        return lax.dynamic_update_slice(array, new, starts[ones:])

    array = loop_form(operand)
    if len(indices) == 1:
        array = write(0, array)
    else:
        array = lax.fori_loop(0, len(indices), write, array)
    return replace(operand, array=array.reshape(operand.array.shape))


def scatter_rows(
    operand: Reordered, indices: jax.Array, updates: jax.Array, params: Params
) -> Reordered:
    """Does what a `scatter` that `writes_rows` does, all rows at once.

    XLA transposes an array that is not written along its first axes. So the indices name those that
    come before the last written one too.
    """
    written, indices, rows = _rows(operand, indices, updates, params)
    first = operand.order[: 1 + max(operand.places(written))]
    unwritten = [axis for axis in first if axis not in written]
    shape = rows.shape[: 1 + len(unwritten)]

    def index(axis: int) -> jax.Array:
        if axis not in written:
            return lax.broadcasted_iota(jnp.int32, shape, 1 + unwritten.index(axis))
        return lax.broadcast_in_dim(indices[:, written.index(axis)], shape, (0,))

    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(len(shape), rows.ndim)),
        inserted_window_dims=tuple(range(len(first))),
        scatter_dims_to_operand_dims=tuple(range(len(first))),
    )
    array = lax.scatter(
        operand.array,
        jnp.stack([index(axis) for axis in first], axis=-1),
        rows,
        numbers,
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )
    return replace(operand, array=array)


def _rows(
    operand: Reordered, indices: jax.Array, updates: jax.Array, params: Params
) -> tuple[Axes, jax.Array, jax.Array]:
    """Returns the written axes, (n, these) indices, and n rows in the order of the array."""
    written = params["dimension_numbers"].scatter_dims_to_operand_dims
    indices = indices.reshape(-1, len(written)).astype(jnp.int32)
    kept = [axis for axis in operand.order if axis not in written]
    rows = _bits(updates) if operand.is_bits else updates
    rows = rows.reshape(-1, *updates.shape[updates.ndim - len(kept) :])
    rows = jnp.transpose(rows, (0, *(1 + sorted(kept).index(axis) for axis in kept)))
    return written, indices, rows
