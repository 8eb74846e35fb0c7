"""Rules about the order of axes in memory: loops, and what is done with an array in another order.

`InnerProgram` to `RowsWritten` say a step of the order that an array is in. Where none of them
matches, the array goes back to the program's order.
"""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functional_llm.xla.axis_order import (
    HALF,
    Axes,
    Reordered,
    Value,
    from_loop_form,
    in_program_order,
    loop_form,
    reorder,
    reordered_gather,
    wanted_orders,
    write_rows,
    writes_rows,
)
from functional_llm.xla.jax_private import (
    Loop,
    Params,
    apply,
    dot_general_p,
    gather_p,
    inner_program,
    jit_p,
    scatter_p,
    shape_of,
    while_p,
)
from functional_llm.xla.processor import Processor
from functional_llm.xla.rule import Again, StepRule
from functional_llm.xla.steps import Product, Step, kept_axes


@dataclass(frozen=True)
class LoopOrder(StepRule):
    """XLA transposes a cache that a loop carries in each step, for the products that read it.

    The loop carries it in the order that the products want.

    Args:
        summed_first: Of `wanted_orders`.
        as_bits: Whether half floats are carried as their bits.
    """

    name = "loop_order"
    summed_first: bool = True
    as_bits: bool = True

    def matches(self, step: Step, processor: Processor) -> bool:
        is_loop = step.equation.primitive is while_p
        return is_loop and any(self._orders(Loop(step.equation)))

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        loop = Loop(step.equation)
        num_cond = loop.num_cond_constants
        num_constants = num_cond + loop.num_body_constants
        orders = self._orders(loop)[loop.num_body_constants :]
        shapes = [shape_of(x) for x in step.equation.outvars]

        def to_loop(values: list[Value]) -> list[jax.Array]:
            return [
                in_program_order(x) if order is None else loop_form(reorder(x, order, self.as_bits))
                for x, order in zip(values, orders, strict=True)
            ]

        def from_loop(arrays: list[jax.Array]) -> list[Value]:
            triples = zip(arrays, orders, shapes, strict=True)
            return [
                x if order is None else from_loop_form(x, order, shape)
                for x, order, shape in triples
            ]

        def cond(*inputs: jax.Array) -> jax.Array:
            constants, carried = inputs[:num_cond], from_loop([*inputs[num_cond:]])
            return in_program_order(again.run(loop.cond, *constants, *carried)[0])

        def body(*inputs: jax.Array) -> list[jax.Array]:
            count = loop.num_body_constants
            constants, carried = inputs[:count], from_loop([*inputs[count:]])
            return to_loop(again.run(loop.body, *constants, *carried))

        constants = [in_program_order(x) for x in step.inputs[:num_constants]]
        carried = to_loop([*step.inputs[num_constants:]])
        new_cond = jax.make_jaxpr(cond)(*constants[:num_cond], *carried)
        new_body = jax.make_jaxpr(body)(*constants[num_cond:], *carried)
        return [
            in_program_order(x)
            for x in from_loop(loop.run(new_cond, new_body, [*constants, *carried]))
        ]

    def _orders(self, loop: Loop) -> list[Axes | None]:
        return wanted_orders(loop.body.jaxpr, self.summed_first)


class InnerProgram(StepRule):
    """A compiled function inside the program: its steps can be said of the other order."""

    name = "inner_program"

    def matches(self, step: Step, processor: Processor) -> bool:
        return step.has_reordered and step.equation.primitive is jit_p

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        return again.call(inner_program(step.equation), *step.inputs)


@dataclass(frozen=True)
class ProductOfReordered(StepRule):
    """A product reads a factor in whatever order, if the axes that it keeps are in theirs.

    Args:
        turns_smaller: Whether XLA transposes one of two factors of float32 that are both summed
            over their last axes: rather the small one.
    """

    name = "product_of_reordered"
    turns_smaller: bool = True

    def matches(self, step: Step, processor: Processor) -> bool:
        reordered = [isinstance(x, Reordered) for x in step.inputs]
        if step.equation.primitive is not dot_general_p or sum(reordered) != 1:
            return False
        which = reordered.index(True)
        summed, paired = step.equation.params["dimension_numbers"]
        factor = cast(Reordered, step.inputs[which])
        return factor.keeps_order(kept_axes(len(factor.order), summed[which], paired[which]))

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        params = dict(step.equation.params)
        summed, paired = params.pop("dimension_numbers")
        x, y = step.inputs
        is_swapped = isinstance(x, Reordered)
        if isinstance(x, Reordered):
            x, y, summed, paired = y, x, summed[::-1], paired[::-1]
        large, small = cast(Reordered, y), cast(jax.Array, x)
        product = Product(
            small,
            large.numbers,
            (tuple(summed[0]), large.places(summed[1])),
            (tuple(paired[0]), large.places(paired[1])),
            params,
        )
        is_last = max(product.summed[1], default=-1) == product.right.ndim - 1
        if self.turns_smaller and large.dtype == jnp.float32 and is_last:
            result = product.from_swapped(product.swapped().compute())
        else:
            result = again.product(product)
        return [product.swapped().from_swapped(result) if is_swapped else result]


class RowsRead(StepRule):
    """Rows are gathered along other axes just as well."""

    name = "rows_read"

    def matches(self, step: Step, processor: Processor) -> bool:
        if step.equation.primitive is not gather_p:
            return False
        operand, *rest = step.inputs
        return (
            isinstance(operand, Reordered)
            and not any(isinstance(x, Reordered) for x in rest)
            and reordered_gather(operand, step.equation.params) is not None
        )

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        operand, indices = cast(Reordered, step.inputs[0]), cast(jax.Array, step.inputs[1])
        return [_gather(operand, indices, reordered_gather(operand, step.equation.params) or {})]


class RowsWritten(StepRule):
    """Rows are written along other axes just as well, if they are whole."""

    name = "rows_written"

    def matches(self, step: Step, processor: Processor) -> bool:
        if step.equation.primitive is not scatter_p:
            return False
        operand, *rest = step.inputs
        shape, _, updates = step.shapes
        return (
            isinstance(operand, Reordered)
            and not any(isinstance(x, Reordered) for x in rest)
            and writes_rows(shape, updates, step.equation.params)
        )

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        operand, indices, updates = step.inputs
        rows = cast(jax.Array, indices), cast(jax.Array, updates)
        return [write_rows(cast(Reordered, operand), *rows, step.equation.params)]


class HalfRows(StepRule):
    """To take rows of half floats, such as an embedding's, XLA converts the whole to float32.

    Their bits are taken.
    """

    name = "half_rows"

    def matches(self, step: Step, processor: Processor) -> bool:
        is_gather = step.equation.primitive is gather_p and not step.has_reordered
        return is_gather and step.shapes[0].dtype in HALF

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        # XLA would put the conversion to float32 before the bits are taken.
        table, indices = lax.optimization_barrier(tuple(step.arrays))
        order = tuple(range(table.ndim))
        return [_gather(reorder(table, order), indices, step.equation.params)]


def _gather(operand: Reordered, indices: jax.Array, params: Params) -> jax.Array:
    """Gathers from an array, or from its bits, by parameters said of its order."""
    if operand.dtype in HALF:
        fill = params["fill_value"]
        number = np.array(np.nan if fill is None else fill, operand.dtype)
        params = {**params, "fill_value": number.view("uint16").item()}
    result = apply(gather_p, operand.array, indices, **params)
    return Reordered(result, tuple(range(result.ndim)), operand.dtype).numbers


ORDER_RULES = (
    LoopOrder(),
    InnerProgram(),
    ProductOfReordered(),
    RowsRead(),
    RowsWritten(),
    HalfRows(),
)
