"""Matrix products the way XLA computes them fast on the platform that it compiles for.

On CPUs, XLA is slow at

- a bfloat16 product whose result is bfloat16: a sum in float32 takes a fifth of the time;
- a product with a single row: see `row_products`; where that does not serve, in bfloat16 and int8
  two rows take an eighth of the time of one;
- a float32 product with an int8 matrix: in bfloat16 it takes two thirds of the time. The matrix is
  exact there, and what the rows lose is less than it has lost in int8;
- one with a transposed matrix, such as a tied head: a loop turns the matrix round first;
- one that sums over the leading axes of both factors, such as the gradient of a matrix: it turns
  the left one round first, and in a gradient that is the larger one more often than not;
- one that pairs an inner axis of a large array, such as the heads of a cache: see `turned`;
- taking rows of a bfloat16 matrix, an embedding: it turns the whole into float32 in each run.

Which of these a program has is known once it is traced; so they are exchanged there, in the jaxpr,
whoever has written them: a layer, an adapter, a gradient. The graph knows nothing of it, and other
platforms get the program as it was.

Reference:
    [Writing custom interpreters in JAX](https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html).
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import (
    convert_element_type_p,
    dot_general_p,
    gather_p,
    jit_p,
    scatter_p,
    transpose_p,
    while_p,
)

from functional_llm.cpu.axis_order import (
    HALF,
    Turned,
    packed,
    restored,
    turn,
    turned_gather,
    unpacked,
    wanted_orders,
    write_rows,
    writes_rows,
)
from functional_llm.cpu.matrix_vector import is_row_product, row_product

# Before it, JAX binds an equation otherwise, and XLA lacks a product of bfloat16 that is made here.
OLDEST_JAX = (0, 9, 2)
_PROGRAMS = (ClosedJaxpr, Jaxpr)
_FEW = 64  # rows of a product that is worth turning round rather than a matrix
_PART = 1 << 20  # elements of an int8 matrix that are made half floats at once, in a cache


def optimize_for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that computes the same with products that are fast where it runs.

    The same but for the order and the precision of sums; and on CPUs several rows of float32 beside
    an int8 matrix are rounded to bfloat16. To be compiled by `jax.jit`; a transformation such as
    `jax.grad` goes inside. With a JAX before `OLDEST_JAX` it is the function itself.

    Args:
        function: A function from nested structures of arrays to another.
    """
    if jax.default_backend() != "cpu" or jax.__version_info__ < OLDEST_JAX:
        return function

    @wraps(function)
    def fast(*args: Any) -> Any:
        whole = jax.jit(function)
        traced = whole.trace(*args)
        if not _has_exchanged(traced.jaxpr):
            return whole(*args)  # it is traced already
        outputs = [restored(x) for x in _run(traced.jaxpr, {}, *jax.tree.leaves(args))]
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), outputs)

    return fast


def compiler_options() -> dict[str, Any]:
    """Returns what `jax.jit` is to be told besides, for the platform that it compiles for.

    On CPUs, XLA takes vectors of half the width that the newer ones compute with as fast.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def _run(closed: ClosedJaxpr, known: dict[int, Any], *args: Any) -> list[Any]:
    """Evaluates a jaxpr; `known` has the programs inside it that are rewritten already."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = {}
    stored: dict[Any, tuple[Any, bool]] = {}  # variable -> the matrix it comes from, if transposed

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    values |= zip(jaxpr.constvars, closed.consts, strict=True)
    values |= zip(jaxpr.invars, args, strict=True)
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        if any(isinstance(x, Turned) for x in inputs):
            outputs = _turned(equation, inputs, known)
            if outputs is not None:
                values |= zip(equation.outvars, outputs, strict=True)
                continue
            inputs = [restored(x) for x in inputs]
        if equation.primitive is dot_general_p:
            x, y = inputs
            matrix, is_turned = stored.get(equation.invars[1], (y, False))
            outputs = [_product(x, y, matrix, is_turned, **equation.params)]
        elif not _is_exchanged(equation):
            if _is_view(equation):
                matrix, is_turned = stored.get(equation.invars[0], (inputs[0], False))
                is_turned ^= equation.primitive is transpose_p
                stored[equation.outvars[0]] = matrix, is_turned
            outputs = _bind(equation, inputs, known)
        elif equation.primitive is while_p:
            outputs = _loop(equation, inputs, known)
        else:
            outputs = [_gather(*inputs, **equation.params)]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _turned(equation: Any, inputs: list[Any], known: dict[int, Any]) -> list[Any] | None:
    """Evaluates an equation on inputs of which some are turned; `None` if that cannot be."""
    if equation.primitive is jit_p:
        return _run(equation.params["jaxpr"], known, *inputs)
    if equation.primitive is dot_general_p:
        return _turned_product(*inputs, **equation.params)
    first, *rest = inputs
    if any(isinstance(x, Turned) for x in rest):
        return None
    if equation.primitive is gather_p:
        params = turned_gather(first, equation.params)
        return None if params is None else [_gather_turned(first, *rest, **params)]
    if equation.primitive is scatter_p:
        indices, updates = rest
        if writes_rows(equation.invars[0].aval, updates, equation.params):
            return [write_rows(first, indices, updates, equation.params)]
    return None


def _turned_product(x: Any, y: Any, **params: Any) -> list[Any] | None:
    (in_x, in_y), (batch_x, batch_y) = params["dimension_numbers"]
    if isinstance(x, Turned):
        if isinstance(y, Turned):
            return None
        params["dimension_numbers"] = (in_y, in_x), (batch_y, batch_x)
        outputs = _turned_product(y, x, **params)
        return outputs and [_behind(outputs[0], len(batch_x), len(_kept(y, in_y, batch_y)))]
    if not y.keep_order(_kept(y.array, in_y, batch_y)):
        return None
    matrix, in_y, batch_y = y.numbers, y.places(in_y), y.places(batch_y)
    params["dimension_numbers"] = (in_x, in_y), (batch_x, batch_y)
    if y.dtype != jnp.float32 or max(in_y) < matrix.ndim - 1:
        return [_product(x, matrix, matrix, False, **params)]
    # In float32 rather the small factor than the large one transposed.
    params["dimension_numbers"] = (in_y, in_x), (batch_y, batch_x)
    result = dot_general_p.bind(matrix, x, **params)
    return [_behind(result, len(batch_y), len(_kept(matrix, in_y, batch_y)))]


def _behind(result: Any, first: int, count: int) -> Any:
    """Moves `count` axes behind all others."""
    return jnp.moveaxis(result, range(first, first + count), range(-count, 0))


def _loop(equation: Any, inputs: list[Any], known: dict[int, Any]) -> list[Any]:
    """A loop that carries its arrays in the order that its products want."""
    params = equation.params
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    orders = wanted_orders(body.jaxpr)[num_body:]
    consts, carried = inputs[: num_cond + num_body], inputs[num_cond + num_body :]
    avals = [x.aval for x in equation.outvars]

    def laid_out(values: list[Any]) -> list[Any]:
        pairs = zip(values, orders, strict=True)
        return [restored(x) if order is None else packed(turn(x, order)) for x, order in pairs]

    def read(arrays: Any) -> list[Any]:
        triples = zip(arrays, orders, avals, strict=True)
        return [x if order is None else unpacked(x, order, aval) for x, order, aval in triples]

    def run_cond(*args: Any) -> Any:
        return restored(_run(cond, known, *args[:num_cond], *read(args[num_cond:]))[0])

    def run_body(*args: Any) -> list[Any]:
        return laid_out(_run(body, known, *args[:num_body], *read(args[num_body:])))

    carried = laid_out(carried)
    new_cond = jax.make_jaxpr(run_cond)(*consts[:num_cond], *carried)
    new_body = jax.make_jaxpr(run_body)(*consts[num_cond:], *carried)
    params = {**params, "cond_jaxpr": new_cond, "body_jaxpr": new_body}
    return [restored(x) for x in read(while_p.bind(*consts, *carried, **params))]


def _bind(equation: Any, inputs: list[Any], known: dict[int, Any]) -> list[Any]:
    """Makes a call again, with the programs in its parameters (of a loop, say) rewritten."""
    params = {key: _rewrite(x, known) for key, x in equation.params.items()}
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return outputs if equation.primitive.multiple_results else [outputs]


def _rewrite(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, (tuple, list)) and any(isinstance(x, _PROGRAMS) for x in value):
        return type(value)(_rewrite(x, known) for x in value)
    if not isinstance(value, _PROGRAMS) or not _has_exchanged(value):
        return value
    if id(value) not in known:
        closed = value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())
        new = jax.make_jaxpr(lambda *args: [*map(restored, _run(closed, known, *args))])(
            *closed.in_avals
        )
        known[id(value)] = value, new if value is closed else new.jaxpr  # kept: ids are used again
    return known[id(value)][1]


def _has_exchanged(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_exchanged(x) for x in value)
    if not isinstance(value, _PROGRAMS):
        return False
    return any(
        _is_exchanged(x) or _is_of_int8(x) or _has_exchanged([*x.params.values()])
        for x in value.eqns
    )


def _is_view(equation: Any) -> bool:
    """Whether a matrix is transposed, or made of int8."""
    is_transpose = equation.primitive is transpose_p
    return (is_transpose or _is_of_int8(equation)) and equation.invars[0].aval.ndim == 2


def _is_of_int8(equation: Any) -> bool:
    is_conversion = equation.primitive is convert_element_type_p
    return is_conversion and equation.invars[0].aval.dtype == jnp.int8


def _is_exchanged(equation: Any) -> bool:
    if equation.primitive is while_p:
        return any(wanted_orders(equation.params["body_jaxpr"].jaxpr))
    if equation.primitive not in (dot_general_p, gather_p):
        return False
    avals = [x.aval for x in equation.invars]
    if avals[0].dtype in HALF:
        return True
    if equation.primitive is gather_p:
        return False
    x, y = avals
    (in_x, in_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    return (
        jnp.int8 in (x.dtype, y.dtype)
        or is_row_product(x, y, ((in_x, in_y), (batch_x, batch_y)))
        or is_row_product(y, x, ((in_y, in_x), (batch_y, batch_x)))
        or _is_swapped(x, y, **equation.params)
    )


def _is_swapped(x: Any, y: Any, *, dimension_numbers: Any, **params: Any) -> bool:
    """Whether the left factor would be turned round, and the right one is smaller."""
    contracting, batch = dimension_numbers
    for factor, summed, paired in zip((x, y), contracting, batch, strict=True):
        kept = _kept(factor, summed, paired)
        if not summed or not kept or max(summed) > min(kept):
            return False
    return bool(y.size < x.size)


def _kept(factor: Any, summed: Any, paired: Any) -> list[int]:
    """Returns the axes of a factor that only the result's axes of its own come from."""
    return [axis for axis in range(factor.ndim) if axis not in (*summed, *paired)]


def _product(x: Any, y: Any, matrix: Any, is_turned: bool, **params: Any) -> Any:
    """A product with its sums in float32 or int32: a row's own, or two rows at least.

    Args:
        x: Any shape.
        y: Any shape, of the same dtype as `x` to be changed at all.
        matrix: What `y` has been made of: itself, or a matrix in another dtype or order.
        is_turned: Whether `y` is the transpose of that.
        params: Of `lax.dot_general`.
    """
    (in_x, in_y), (batch_x, batch_y) = params["dimension_numbers"]
    dtype = params["preferred_element_type"] or x.dtype
    of_matrix = [
        tuple(1 - axis if is_turned else axis for axis in axes) for axes in (in_y, batch_y)
    ]
    numbers = (tuple(in_x), of_matrix[0]), (tuple(batch_x), of_matrix[1])
    if is_row_product(x, matrix, numbers):
        return row_product(x, matrix, numbers).astype(dtype)
    swapped = (in_y, in_x), (batch_y, batch_x)
    if _is_swapped(x, y, **params) or is_row_product(y, x, swapped):
        params["dimension_numbers"] = swapped
        result = _product(y, x, x, False, **params)  # axes: batch, those kept of y, those kept of x
        first, count = len(batch_y), len(_kept(y, in_y, batch_y))
        return jnp.moveaxis(result, range(first, first + count), range(-count, 0))
    if x.dtype in (*HALF, jnp.float32) and matrix.dtype == jnp.int8:
        return _product_with_int8(x, matrix, is_turned, **params).astype(dtype)
    if x.dtype != y.dtype or x.dtype not in (*HALF, jnp.int8):
        return dot_general_p.bind(x, y, **params)
    if x.dtype in HALF:
        params["preferred_element_type"] = jnp.dtype("float32")
    kept = _kept(x, in_x, batch_x)
    num_rows = math.prod(x.shape[axis] for axis in kept)
    is_single = num_rows == 1 and kept and not batch_x
    if is_single:
        x = jnp.concatenate([x, x], axis=kept[0])
    is_turned &= matrix.dtype == y.dtype  # else it is not the transpose, in this dtype
    if is_turned and not batch_x and tuple(in_y) == (1,):
        y, in_y, is_turned = matrix, (0,), False  # a transpose of a transpose
        params["dimension_numbers"] = (in_x, in_y), ((), ())
    if is_turned and num_rows <= _FEW and not batch_x and tuple(in_y) == (0,):
        params["dimension_numbers"] = ((1,), in_x), ((), ())
        result = jnp.moveaxis(dot_general_p.bind(matrix, x, **params), 0, -1)
    else:
        if kept and min(in_x, default=x.ndim) < max(kept):
            x, in_x, batch_x = _turn(x, in_x, batch_x)
            params["dimension_numbers"] = (in_x, in_y), (batch_x, batch_y)
        result = dot_general_p.bind(x, y, **params)
    return (lax.slice_in_dim(result, 0, 1, axis=0) if is_single else result).astype(dtype)


def _product_with_int8(x: Any, matrix: Any, is_turned: bool, **params: Any) -> Any:
    """The product of floats with an int8 matrix, in half precision: the matrix is exact there.

    A large one, such as a head, is not made half floats as a whole, which would go to memory and
    back.
    """
    x = x if x.dtype in HALF else x.astype("bfloat16")
    params["preferred_element_type"] = jnp.dtype("float32")

    def product(part: Any) -> Any:
        half = (part + _zero_after(x)).astype(x.dtype)
        return _product(x, half.T if is_turned else half, half, is_turned, **params)

    ((_, in_y), _) = params["dimension_numbers"]
    count = _num_parts(matrix) if is_turned and tuple(in_y) == (0,) else 1
    if count == 1:
        return product(matrix)
    parts = lax.map(product, matrix.reshape(count, -1, matrix.shape[1]))
    return jnp.moveaxis(parts, 0, -2).reshape(*parts.shape[1:-1], -1)


def _num_parts(matrix: Any) -> int:
    """Returns into how many parts, of equal numbers of rows, a large matrix is cut."""
    fewest = max(1, matrix.size // _PART)
    return next((n for n in range(fewest, 4 * fewest) if len(matrix) % n == 0), 1)


def _zero_after(x: Any) -> Any:
    """Returns an int8 zero that is known only once `x` is.

    What is made of an int8 matrix with it cannot be made before the loop that `x` is computed in,
    nor long before it is needed, and stand in memory until then.
    """
    bits = lax.bitcast_convert_type(x.reshape(-1)[0], "uint16")
    return ((bits & 1) >> 1).astype("int8")


def _turn(x: Any, summed: Any, paired: Any) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """Returns a left factor as a product wants it, the axes that are summed over last.

    XLA would do it; but some of what it makes of it then, it cannot compute in bfloat16 ("DotThunk:
    BF16 x BF16 = F32"). It must not see through it, therefore the barrier.
    """
    kept = _kept(x, summed, paired)
    turned = lax.optimization_barrier(jnp.transpose(x, (*paired, *kept, *summed)))
    return turned, tuple(range(x.ndim - len(summed), x.ndim)), tuple(range(len(paired)))


def _gather(x: Any, indices: Any, **params: Any) -> Any:
    """Gathers the bits of half floats."""
    x, indices = lax.optimization_barrier((x, indices))
    return _gather_turned(turn(x, tuple(range(x.ndim))), indices, **params)


def _gather_turned(x: Turned, indices: Any, *, fill_value: Any, **params: Any) -> Any:
    if x.dtype in HALF:
        fill = np.array(np.nan if fill_value is None else fill_value, x.dtype)
        fill_value = fill.view("uint16").item()
    result = gather_p.bind(x.array, indices, fill_value=fill_value, **params)
    return Turned(result, tuple(range(result.ndim)), x.dtype).numbers
