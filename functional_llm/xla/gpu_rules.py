"""Rules about what XLA compiles badly on GPUs, where the number of kernels bounds a decode step."""

from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.xla.axis_order import (
    HALF,
    Reordered,
    Value,
    reorder,
    scatter_rows,
    write_rows,
    writes_rows,
)
from functional_llm.xla.jax_private import scatter_p
from functional_llm.xla.order_rules import InnerProgram, LoopOrder, ProductOfReordered, RowsRead
from functional_llm.xla.processor import Processor
from functional_llm.xla.rule import Again, ProductRule, Rule, StepRule
from functional_llm.xla.steps import Product, Step

_SMALL = 1 << 14  # elements of a matrix that is not worth a second row


class OneRowWritten(StepRule):
    """To write one row, XLA checks in kernels of their own whether it lies inside.

    It is written as a slice.
    """

    name = "one_row_written"

    def matches(self, step: Step, processor: Processor) -> bool:
        if not _writes_rows(step):
            return False
        _, indices, _ = step.shapes
        return indices.size == indices.shape[-1]

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        operand, indices, updates = step.inputs
        is_reordered = isinstance(operand, Reordered)
        order = operand.order if isinstance(operand, Reordered) else tuple(range(operand.ndim))
        target = reorder(operand, order, as_bits=False)
        rows = cast(jax.Array, indices), cast(jax.Array, updates)
        result = write_rows(target, *rows, step.equation.params)
        return [result if is_reordered else result.numbers]


class RowsScattered(StepRule):
    """Rows are written along other axes just as well, if they are whole."""

    name = "rows_scattered"

    def matches(self, step: Step, processor: Processor) -> bool:
        return _writes_rows(step) and isinstance(step.inputs[0], Reordered)

    def rewrite(self, step: Step, again: Again) -> list[Value]:
        operand, indices, updates = step.inputs
        rows = cast(jax.Array, indices), cast(jax.Array, updates)
        return [scatter_rows(cast(Reordered, operand), *rows, step.equation.params)]


class HalfRow(ProductRule):
    """XLA multiplies one row of half floats with a matrix by writing all products to memory.

    Then it sums them up, rounded as they are. With two rows it calls a kernel for products.
    """

    name = "half_row"

    def matches(self, product: Product, processor: Processor) -> bool:
        is_single = product.num_rows == 1 and product.kept[0] and not product.paired[0]
        is_half = product.left.dtype in HALF
        return bool(is_single and is_half and product.right.size >= _SMALL)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        left, axis = product.left, product.kept[0][0]
        shape = [2 if i == axis else n for i, n in enumerate(left.shape)]
        two = replace(product, left=jnp.broadcast_to(left, shape))
        return lax.slice_in_dim(again.product(two), 0, 1, axis=0)


def _writes_rows(step: Step) -> bool:
    """Whether a step is a `scatter` of whole rows into an array in whatever order."""
    if step.equation.primitive is not scatter_p:
        return False
    shape, _, updates = step.shapes
    others = any(isinstance(x, Reordered) for x in step.inputs[1:])
    return not others and writes_rows(shape, updates, step.equation.params)


GPU_RULES: tuple[Rule, ...] = (
    LoopOrder(as_bits=False),
    InnerProgram(),
    ProductOfReordered(turns_smaller=False),
    RowsRead(),
    OneRowWritten(),
    RowsScattered(),
    HalfRow(),
)
