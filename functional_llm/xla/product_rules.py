"""Rules about single products, in the order in which they are tried."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from functional_llm.xla.axis_order import HALF
from functional_llm.xla.matrix_vector import is_matrix_vector, multiply_matrix_vector
from functional_llm.xla.processor import Processor
from functional_llm.xla.rule import Again, ProductRule
from functional_llm.xla.steps import Product, Source

_FEW = 64  # rows of a product whose result is worth transposing rather than a matrix
_FEW_WITHOUT_BFLOAT16 = 32
_PART = 1 << 20  # elements of an int8 matrix that are converted at once, in a cache


class MatrixVector(ProductRule):
    """XLA multiplies one row with a matrix at half of the memory's speed or less.

    See `matrix_vector`.
    """

    name = "matrix_vector"

    def matches(self, product: Product, processor: Processor) -> bool:
        product = product.of_source()
        return is_matrix_vector(product.left, product.right, product.summed, product.paired)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        product = product.of_source()
        result = multiply_matrix_vector(product.left, product.right, product.summed)
        return result.astype(product.dtype)


class VectorMatrix(ProductRule):
    """The same where the one row is the right factor."""

    name = "vector_matrix"

    def matches(self, product: Product, processor: Processor) -> bool:
        return MatrixVector().matches(product.swapped(), processor)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        return product.from_swapped(again.product(product.swapped()))


class SmallerLeft(ProductRule):
    """XLA transposes the left one of two factors that are summed over their leading axes.

    Such is the gradient of a matrix, and there the left factor is the larger one more often than
    not. The smaller one goes left.
    """

    name = "smaller_left"

    def matches(self, product: Product, processor: Processor) -> bool:
        for summed, kept in zip(product.summed, product.kept, strict=True):
            if not summed or not kept or max(summed) > min(kept):
                return False
        return bool(product.right.size < product.left.size)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        return product.from_swapped(again.product(product.swapped()))


class _Int8(ProductRule):
    """A product of floats with an int8 matrix, which a rule converts to another dtype.

    A large matrix, such as a head, is converted in parts, which stay in a cache.
    """

    def multiply(self, product: Product, left: jax.Array, again: Again) -> jax.Array:
        """Returns the product with the left factor in a dtype that the matrix is converted to."""
        source = product.source or Source(product.right)
        matrix, is_transposed = source.matrix, source.is_transposed

        def multiply_part(part: jax.Array) -> jax.Array:
            converted = (part + _zero_after(left)).astype(left.dtype)
            part_product = replace(
                product.with_sums_in("float32"),
                left=left,
                right=converted.T if is_transposed else converted,
                source=Source(converted, is_transposed),
            )
            return again.product(part_product)

        is_head = is_transposed and product.summed[1] == (0,)
        count = _num_parts(matrix) if is_head else 1
        if count == 1:
            return multiply_part(matrix).astype(product.dtype)
        parts = lax.map(multiply_part, matrix.reshape(count, -1, matrix.shape[1]))
        result = jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], -1)
        return result.astype(product.dtype)


class Int8AsHalf(_Int8):
    """XLA converts an int8 matrix to float32 as a whole, and multiplies in float32.

    In half precision the matrix is exact too, and the product takes two thirds of the time. What
    the rows lose by rounding is less than the matrix has lost in int8.
    """

    name = "int8_as_half"

    def matches(self, product: Product, processor: Processor) -> bool:
        return processor.bfloat16 and _has_int8_matrix(product)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        is_half = product.left.dtype in HALF
        left = product.left if is_half else product.left.astype(jnp.bfloat16)
        return self.multiply(product, left, again)


class Int8AsFloat32(_Int8):
    """XLA multiplies bfloat16 rows with an int8 matrix in bfloat16, and converts all of it first.

    A processor without instructions for bfloat16 is faster in float32: with 32 rows of 576x1536 in
    a seventh of the time. The matrix is converted when its rows come.
    """

    name = "int8_as_float32"

    def matches(self, product: Product, processor: Processor) -> bool:
        return not processor.bfloat16 and _has_int8_matrix(product)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        return self.multiply(product, product.left.astype(jnp.float32), again)


def _has_int8_matrix(product: Product) -> bool:
    """Whether floats are multiplied with a matrix that is int8, or was."""
    is_int8 = product.of_source().right.dtype == jnp.int8
    return is_int8 and product.left.dtype in (*HALF, jnp.float32)


def _num_parts(matrix: jax.Array) -> int:
    """Returns into how many parts, of equal numbers of rows, a large matrix is cut."""
    fewest = max(1, matrix.size // _PART)
    return next((n for n in range(fewest, 4 * fewest) if len(matrix) % n == 0), 1)


def _zero_after(x: jax.Array) -> jax.Array:
    """Returns an int8 zero that is known only once `x` is.

    What is made of an int8 matrix with it cannot be made before the loop that computes `x`, nor
    long before it is needed, and stand in memory until then.
    """
    bits_of = jnp.uint16 if x.dtype in HALF else jnp.uint32
    bits = lax.bitcast_convert_type(x.reshape(-1)[0], bits_of)
    return ((bits & 1) >> 1).astype(jnp.int8)


class Float32Sums(ProductRule):
    """A half-precision product whose result is in half precision takes XLA five times as long.

    XLA computes it in float32. A processor without instructions for bfloat16 gains where there are
    few rows; with 64 or more it loses.
    """

    name = "float32_sums"

    def matches(self, product: Product, processor: Processor) -> bool:
        dtype = product.left.dtype
        is_half = dtype in HALF and product.right.dtype == dtype and product.dtype != jnp.float32
        return is_half and (processor.bfloat16 or product.num_rows <= _FEW_WITHOUT_BFLOAT16)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        return again.product(product.with_sums_in("float32")).astype(product.dtype)


class TwoRows(ProductRule):
    """A half-precision or int8 product takes XLA eight times as long with one row as with two."""

    name = "two_rows"

    def matches(self, product: Product, processor: Processor) -> bool:
        is_single = product.num_rows == 1 and product.kept[0] and not product.paired[0]
        return bool(_is_narrow(product) and is_single)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        axis = product.kept[0][0]
        two = jnp.concatenate([product.left, product.left], axis=axis)
        return lax.slice_in_dim(again.product(replace(product, left=two)), 0, 1, axis=0)


class TransposedTwice(ProductRule):
    """A transposed matrix that is summed over its last axis is one summed over its first."""

    name = "transposed_twice"

    def matches(self, product: Product, processor: Processor) -> bool:
        return _is_transposed(product) and product.summed[1] == (1,)

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        return again.product(product.of_source())


class TransposedMatrix(ProductRule):
    """A transposed matrix, such as a tied head: in a loop, XLA transposes it in memory first.

    The rows go right of the matrix as it is, and the result, if it has few rows, is transposed.
    """

    name = "transposed_matrix"

    def matches(self, product: Product, processor: Processor) -> bool:
        return _is_transposed(product) and product.summed[1] == (0,) and product.num_rows <= _FEW

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        product = product.of_source()
        return product.from_swapped(product.swapped().compute())


class SummedLast(ProductRule):
    """A left factor that is not summed over its last axes is transposed, as XLA would do.

    Some of what XLA makes of it then, it cannot compute in bfloat16 ("DotThunk: BF16 x BF16 =
    F32"). It must not see through it, therefore the barrier.
    """

    name = "summed_last"

    def matches(self, product: Product, processor: Processor) -> bool:
        kept = product.kept[0]
        is_last = min(product.summed[0], default=product.left.ndim) >= max(kept, default=-1)
        return _is_narrow(product) and not is_last

    def rewrite(self, product: Product, again: Again) -> jax.Array:
        left, summed, paired = product.left, product.summed[0], product.paired[0]
        order = (*paired, *product.kept[0], *summed)
        last = tuple(range(left.ndim - len(summed), left.ndim))
        return again.product(
            replace(
                product,
                left=lax.optimization_barrier(jnp.transpose(left, order)),
                summed=(last, product.summed[1]),
                paired=(tuple(range(len(paired))), product.paired[1]),
            )
        )


def _is_narrow(product: Product) -> bool:
    """Whether both factors are int8, or half floats with their sums in float32."""
    dtype = product.left.dtype
    is_half = dtype in HALF and product.dtype == jnp.float32
    return product.right.dtype == dtype and (is_half or dtype == jnp.int8)


def _is_transposed(product: Product) -> bool:
    """Whether the right factor is the transpose of a matrix in its narrow dtype."""
    source = product.source
    if source is None or product.paired[0] or not _is_narrow(product):
        return False
    return source.is_transposed and source.matrix.dtype == product.right.dtype


PRODUCT_RULES = (
    MatrixVector(),
    VectorMatrix(),
    SmallerLeft(),
    Int8AsHalf(),
    Int8AsFloat32(),
    Float32Sums(),
    TwoRows(),
    TransposedTwice(),
    TransposedMatrix(),
    SummedLast(),
)
