"""Arrays whose axes lie in another order in memory than the program says.

A product that pairs an inner axis of a large array, such as the heads of a cache (B, S, K, H),
wants the paired axes first: (B, K, S, H). XLA turns the whole array round then, each time. A loop
that carries the array had better carry it in that order. All that is done with it, a row written
or read, a product, can be said of other axes just as well, without moving a number. The price is
memory: while such a loop runs, what it was given and is to return stands beside what it carries.

Shapes: B batch, S slots, K heads, H head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.extend.core.primitives import dot_general_p, jit_p, scatter_p

HALF = (jnp.bfloat16, jnp.float16)
Order = tuple[int, ...]
_FEW = 64  # rows of the other factor, for each of the paired axes


@dataclass(frozen=True)
class Turned:
    """What `array` stands for: its axis i is axis `order[i]` of that.

    Half floats are held as their bits: to write some, XLA would make float32 of all.
    """

    array: Any
    order: Order
    dtype: Any

    @property
    def is_bits(self) -> bool:
        """Whether the array holds the bits of half floats."""
        return self.array.dtype != self.dtype

    @property
    def numbers(self) -> Any:
        """The array in its dtype."""
        return lax.bitcast_convert_type(self.array, self.dtype) if self.is_bits else self.array

    def places(self, axes: Sequence[int]) -> Order:
        """Returns where these axes are."""
        return tuple(self.order.index(axis) for axis in axes)

    def keep_order(self, axes: Sequence[int]) -> bool:
        """Whether these axes follow one another as the program says."""
        places = self.places(sorted(axes))
        return list(places) == sorted(places)


def turn(value: Any, order: Order) -> Turned:
    """Returns a value, turned already or not, in an order of axes."""
    if isinstance(value, Turned) and value.order == order:
        return value
    value = restored(value)
    return Turned(_bits(jnp.transpose(value, order)), order, value.dtype)


def packed(turned: Turned) -> Any:
    """Returns the array as a loop carries it: without its first axes, as long as they have size 1.

    Products have no such axes in XLA. If the array had them where it is written and not where it is
    read, XLA would copy it.
    """
    return turned.array.reshape(turned.array.shape[_num_ones(turned) :])


def unpacked(array: Any, order: Order, like: Any) -> Turned:
    """Returns what was `packed` of an array with this order and the shape and dtype of `like`."""
    return Turned(array.reshape([like.shape[axis] for axis in order]), order, like.dtype)


def _num_ones(turned: Turned) -> int:
    """Returns how many of the first axes are left out, where an array is carried or written.

    None of bits: it is the other way round with them, for the product reads what is made of them.
    """
    if turned.is_bits:
        return 0
    return next((i for i, size in enumerate(turned.array.shape) if size != 1), turned.array.ndim)


def restored(value: Any) -> Any:
    """Returns an array with its axes as the program says, whatever order they are in."""
    if not isinstance(value, Turned):
        return value
    return jnp.transpose(value.numbers, np.argsort(value.order).tolist())


def _bits(x: Any) -> Any:
    return lax.bitcast_convert_type(x, "uint16") if x.dtype in HALF else x


def wanted_orders(jaxpr: Any) -> list[Order | None]:
    """Returns the order that products want of each input of a program, if it is not its own."""
    orders, _ = _look(jaxpr)
    return [orders.get(variable) for variable in jaxpr.invars]


def _look(jaxpr: Any) -> tuple[dict[Any, Order], dict[Any, Any]]:
    """Returns input -> order, and variable -> the input that it is, but for some rows."""
    origins = {variable: variable for variable in jaxpr.invars}
    orders: dict[Any, Order] = {}
    for equation in jaxpr.eqns:
        inputs = [None if isinstance(x, Literal) else origins.get(x) for x in equation.invars]
        if equation.primitive is scatter_p:
            origins[equation.outvars[0]] = inputs[0]
        elif equation.primitive is jit_p:
            inner = equation.params["jaxpr"].jaxpr
            found, sources = _look(inner)
            outer = dict(zip(inner.invars, inputs, strict=True))
            for variable, order in found.items():
                orders.setdefault(outer[variable], order)
            for variable, result in zip(equation.outvars, inner.outvars, strict=True):
                source = None if isinstance(result, Literal) else sources.get(result)
                origins[variable] = outer.get(source)
        elif equation.primitive is dot_general_p:
            for which in (0, 1):
                wanted = _wanted_order(equation, which)
                if wanted is not None:
                    orders.setdefault(inputs[which], wanted)
    orders.pop(None, None)
    return orders, origins


def _wanted_order(equation: Any, which: int) -> Order | None:
    """Returns the order of a factor: the axes that are paired, those summed over, the others."""
    contracting, batch = equation.params["dimension_numbers"]
    factor, other = (equation.invars[i].aval for i in (which, 1 - which))
    paired = batch[which]
    if list(paired) == list(range(len(paired))) or factor.size <= other.size:
        return None
    taken = [*batch[1 - which], *contracting[1 - which]]
    if math.prod(n for axis, n in enumerate(other.shape) if axis not in taken) > _FEW:
        return None
    summed = contracting[which]
    others = (axis for axis in range(factor.ndim) if axis not in (*paired, *summed))
    return (*paired, *summed, *others)


def turned_gather(operand: Turned, params: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the parameters with which `gather` gives the same; `None` if there are none."""
    numbers = params["dimension_numbers"]
    fixed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offsets = [axis for axis in range(len(operand.order)) if axis not in fixed]
    paired = operand.places(numbers.operand_batching_dims)
    if not operand.keep_order(offsets) or list(paired) != sorted(paired):
        return None
    numbers = numbers._replace(
        collapsed_slice_dims=tuple(sorted(operand.places(numbers.collapsed_slice_dims))),
        start_index_map=operand.places(numbers.start_index_map),
        operand_batching_dims=paired,
    )
    sizes = tuple(params["slice_sizes"][axis] for axis in operand.order)
    return {**params, "dimension_numbers": numbers, "slice_sizes": sizes}


def writes_rows(operand: Any, updates: Any, params: dict[str, Any]) -> bool:
    """Whether a `scatter` writes whole rows, one for each of its indices.

    Args:
        operand: What it writes to, or its shape and dtype, as the program says.
        updates: What it writes, likewise.
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


def write_rows(operand: Turned, indices: Any, updates: Any, params: dict[str, Any]) -> Turned:
    """Does what a `scatter` that `writes_rows` does, one row after the other.

    XLA turns an array round that is not written along its first axes, and makes float32 of one in
    half precision; not so if it writes slices.
    """
    written = params["dimension_numbers"].scatter_dims_to_operand_dims
    indices = indices.reshape(-1, len(written)).astype("int32")
    kept = [axis for axis in operand.order if axis not in written]
    rows = _bits(updates).reshape(-1, *updates.shape[updates.ndim - len(kept) :])
    rows = jnp.transpose(rows, (0, *(1 + sorted(kept).index(axis) for axis in kept)))
    shape = [
        1 if axis in written else n
        for axis, n in zip(operand.order, operand.array.shape, strict=True)
    ]
    limits = np.array([operand.array.shape[place] for place in operand.places(written)], "int32")
    is_inside = jnp.all((indices >= 0) & (indices < limits), axis=1)
    ones = _num_ones(operand)

    def write(i: Any, array: Any) -> Any:
        index = lax.dynamic_index_in_dim(indices, i, keepdims=False)
        row = lax.dynamic_index_in_dim(rows, i, keepdims=False).reshape(shape[ones:])
        starts = [index[written.index(axis)] if axis in written else 0 for axis in operand.order]
        old = lax.dynamic_slice(array, starts[ones:], row.shape)
        new = jnp.where(lax.dynamic_index_in_dim(is_inside, i, keepdims=False), row, old)
        return lax.dynamic_update_slice(array, new, starts[ones:])

    array = packed(operand)
    if len(indices) == 1:
        array = write(0, array)
    else:
        array = lax.fori_loop(0, len(indices), write, array)
    return replace(operand, array=array.reshape(operand.array.shape))
