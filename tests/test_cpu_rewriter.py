"""Programs with products that XLA computes fast on CPUs: the same numbers, and no slow product."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from functional_llm.xla.processor import Processor
from functional_llm.xla.rewriter import optimize_for_cpu as optimize

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="others need no exchange"),
    pytest.mark.optimized,
]
RANDOM = np.random.default_rng(0)
PROCESSORS = {"bfloat16": Processor(bfloat16=True), "no bfloat16": Processor()}
optimize_for_cpu = partial(optimize, processor=PROCESSORS["bfloat16"])


def _array(*shape: int, dtype: str = "bfloat16") -> Any:
    if dtype == "int8":
        return jnp.asarray(RANDOM.integers(-127, 128, shape).astype("int8"))
    return jnp.asarray(RANDOM.normal(size=shape), dtype)


def _products(program: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the inputs and the result of every product, those in inner programs too."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield [x.aval for x in equation.invars], equation.outvars[0].aval
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                    yield from _products(inner)


def _matmul(x: Any, y: Any) -> Any:
    return x @ y


def _head(x: Any, y: Any) -> Any:
    return x @ y.T


def _paired(x: Any, y: Any) -> Any:
    return jnp.einsum("bk,bk->b", x, y.T)


def _summed(x: Any, y: Any) -> Any:
    return jnp.einsum("abk,bk->a", x, y.T)


def _bytes(x: Any, y: Any) -> Any:
    return jnp.matmul(x, y, preferred_element_type="int32")


def _loop(x: Any, y: Any) -> Any:
    def body(i: Any, carry: Any) -> Any:
        return jax.lax.cond(i > 0, lambda c: jnp.tanh(c @ y), lambda c: c @ y, carry)

    return jax.lax.fori_loop(0, 3, body, x)


def _scan(x: Any, y: Any) -> Any:
    step = jax.checkpoint(lambda carry, w: (jax.nn.silu(carry @ w), None))
    return jax.lax.scan(step, x, jnp.stack([y, y]))[0]


def _attention(x: Any, y: Any) -> Any:
    return jnp.einsum("btkh,bskh->bkts", x, y)


def _gradient(x: Any, y: Any) -> Any:
    def loss(x: Any, y: Any) -> Any:
        return jnp.sum(_scan(x, y).astype("float32") ** 2)

    return jax.value_and_grad(loss, (0, 1))(x, y)


CASES: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "one row": (_matmul, _array(1, 24), _array(24, 40)),
    "one token": (_matmul, _array(1, 1, 24), _array(24, 40)),
    "rows": (_matmul, _array(2, 3, 24), _array(24, 40)),
    "half": (_matmul, _array(2, 24, dtype="float16"), _array(24, 40, dtype="float16")),
    "one row of a head": (_head, _array(1, 1, 24), _array(100, 24)),
    "rows of a head": (_head, _array(2, 3, 24), _array(100, 24)),
    "many rows of a head": (_head, _array(2, 70, 24), _array(100, 24)),
    "one row of bytes": (_bytes, _array(1, 24, dtype="int8"), _array(24, 40, dtype="int8")),
    "bytes": (_bytes, _array(2, 3, 24, dtype="int8"), _array(24, 40, dtype="int8")),
    "a loop": (_loop, _array(1, 24), _array(24, 24)),
    "a scan": (_scan, _array(2, 24), _array(24, 24)),
    "batches": (_attention, _array(2, 1, 3, 8), _array(2, 5, 3, 8)),
    "gradients": (_gradient, _array(1, 24), _array(24, 24)),
    "rows paired with a transpose": (_paired, _array(5, 24), _array(24, 5)),
    "all of a transpose": (_summed, _array(2, 5, 24), _array(24, 5)),
    "a vector": (_matmul, _array(24), _array(24, 40)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_same_and_no_product_is_slow(case: str) -> None:
    function, x, y = CASES[case]
    fast = optimize_for_cpu(function)
    result, expected = jax.jit(fast)(x, y), jax.jit(function)(x, y)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), result) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, "float32"), np.asarray(theirs, "float32")
        tolerance = 0 if x.dtype == jnp.int8 else 0.02 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    products = list(_products(jax.make_jaxpr(fast)(x, y)))
    assert products
    for inputs, output in products:
        assert output.dtype == ("int32" if inputs[0].dtype == jnp.int8 else "float32")
        rows = [a.size // 24 for a in inputs]
        assert 1 not in rows or case in ("batches", "gradients", "a vector")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "subscripts", ["nf,nr->fr", "btf,btr->fr", "bktf,bktr->bkfr", "btkf,btkr->bkfr"]
)
def test_the_smaller_factor_of_a_gradient_is_turned_round(subscripts: str, dtype: str) -> None:
    dims, _, out = subscripts.replace(",", "->").split("->")
    sizes = {"n": 24, "b": 2, "t": 12, "k": 3, "f": 40, "r": 8}
    x = _array(*(sizes[axis] for axis in dims), dtype=dtype)
    y = _array(*(sizes[axis] for axis in dims.replace("f", "r")), dtype=dtype)
    first = len(out) - 2  # the axes that stay pairs
    summed = [dims.index(axis) for axis in dims if axis not in out and axis != "f"]
    paired = [dims.index(axis) for axis in out if axis in "bk" and first]

    def gradient(x: Any, y: Any) -> Any:
        return jax.lax.dot_general(x, y, ((summed, summed), (paired, paired)))

    fast = optimize_for_cpu(gradient)
    expected = np.einsum(subscripts, np.asarray(x, "float32"), np.asarray(y, "float32"))
    tolerance = {"float32": 1e-4, "bfloat16": 0.01 * np.abs(expected).max()}[dtype]
    np.testing.assert_allclose(np.asarray(jax.jit(fast)(x, y), "float32"), expected, atol=tolerance)
    (((left, right), _),) = _products(jax.make_jaxpr(fast)(x, y))
    assert left.size < right.size


def test_an_embedding_gives_its_very_rows() -> None:
    table, ids = _array(50, 8), np.array([[3, 49], [0, 7], [-1, 50]])

    def look_up(table: Any, ids: Any) -> Any:
        return jnp.take(table, ids, axis=0)

    result = np.asarray(jax.jit(optimize_for_cpu(look_up))(table, ids), "float32")
    expected = np.asarray(look_up(table, ids), "float32")
    np.testing.assert_array_equal(result, expected)
    assert np.isnan(result[2, 1]).all()  # beyond the table, as ever


def test_a_float32_program_stays_as_it_is_and_is_traced_once() -> None:
    calls = []

    def function(x: Any, y: Any) -> Any:
        calls.append(x)
        return _loop(x, y)

    x, y = _array(1, 24, dtype="float32"), _array(24, 24, dtype="float32")
    program = jax.make_jaxpr(optimize_for_cpu(function))(x, y)
    (equation,), (expected,) = program.eqns, jax.make_jaxpr(_loop)(x, y).eqns
    assert str(equation.params["jaxpr"]) == str(expected.params["jaxpr"])
    assert len(calls) == 1


@pytest.mark.parametrize("size", [576, 1536, 7 * 64])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_one_row_times_a_matrix_is_the_product_of_the_numbers_it_has(
    dtype: str, is_transposed: bool, size: int
) -> None:
    matrix = _array(*((256, size) if is_transposed else (size, 256)), dtype=dtype)
    x = _array(1, 1, size, dtype="float32" if dtype == "int8" else dtype)

    def product(x: Any, matrix: Any) -> Any:
        y = matrix.astype(x.dtype)
        return jnp.matmul(x, y.T if is_transposed else y, preferred_element_type="float32")

    program = jax.make_jaxpr(optimize_for_cpu(product))(x, matrix)
    assert all(matrix.shape not in [y.shape for y in inputs] for inputs, _ in _products(program))
    expected = np.asarray(x, "float64") @ (
        np.asarray(matrix, "float64").T if is_transposed else np.asarray(matrix, "float64")
    )
    result = jax.jit(optimize_for_cpu(product))(x, matrix)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("num_rows", [3, 100])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_only_the_rows_are_rounded_in_a_product_with_bytes(
    processor: str, num_rows: int, is_transposed: bool
) -> None:
    matrix = _array(*((40, 24) if is_transposed else (24, 40)), dtype="int8")
    x = _array(num_rows, 24, dtype="float32")

    def product(x: Any, matrix: Any, is_cast: bool) -> Any:
        y = matrix.T if is_transposed else matrix
        y = y.astype(x.dtype) if is_cast else y
        return jax.lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type="float32")

    dtype = "bfloat16" if PROCESSORS[processor].bfloat16 else "float32"
    rows, bytes_ = np.asarray(x.astype(dtype), "float64"), np.asarray(matrix, "float64")
    expected = rows @ (bytes_.T if is_transposed else bytes_)
    for is_cast in (True, False):  # as strict promotion wants it, and as Keras writes it
        fast = optimize(partial(product, is_cast=is_cast), processor=PROCESSORS[processor])
        for inputs, _ in _products(jax.make_jaxpr(fast)(x, matrix)):
            assert [y.dtype for y in inputs] == [dtype] * 2
        np.testing.assert_allclose(jax.jit(fast)(x, matrix), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_integers_times_bytes_stay_integers(num_rows: int) -> None:
    matrix, x = _array(512, 64, dtype="int8"), jnp.full((num_rows, 512), 2**16 + 1, "int32")

    def product(x: Any, matrix: Any) -> Any:
        return jnp.matmul(x, matrix.astype(x.dtype))

    result = jax.jit(optimize_for_cpu(product))(x, matrix)
    np.testing.assert_array_equal(result, np.asarray(x) @ np.asarray(matrix, "int32"))


@pytest.mark.parametrize("num_rows", [3, 100])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_large_head_of_bytes_in_parts(
    processor: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("functional_llm.xla.product_rules._PART", 200)
    matrix = _array(35, 24, dtype="int8")
    x, weights = _array(2, num_rows, 24, dtype="float32"), _array(2, num_rows, 35, dtype="float32")

    def loss(x: Any, weights: Any) -> Any:
        logits = jnp.matmul(x, matrix.T.astype(x.dtype))
        return jnp.sum(logits * weights), logits

    loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
    program = optimize(loss_and_gradient, processor=PROCESSORS[processor])
    (_, logits), gradient = jax.jit(program)(x, weights)
    dtype = "bfloat16" if PROCESSORS[processor].bfloat16 else "float32"
    x, weights = (np.asarray(a.astype(dtype), "float64") for a in (x, weights))
    exact = np.asarray(matrix, "float64")
    np.testing.assert_allclose(logits, x @ exact.T, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(gradient, weights @ exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_no_copy_of_matrices_of_bytes_stays_in_memory(processor: str) -> None:
    matrices = [_array(256, 256, dtype="int8") for _ in range(12)]

    def step(x: Any, matrices: Any) -> Any:
        for matrix in matrices:
            x = jnp.tanh(x @ matrix.astype(x.dtype))
        return x

    def loop(x: Any, matrices: Any) -> Any:
        return jax.lax.fori_loop(0, 5, lambda i, x: step(x, matrices), x)

    for program in (step, loop):
        fast = jax.jit(optimize(program, processor=PROCESSORS[processor]))
        compiled: Any = fast.lower(_array(4, 256, dtype="float32"), matrices).compile()
        num_bytes = 2 if PROCESSORS[processor].bfloat16 else 4
        assert compiled.memory_analysis().temp_size_in_bytes < 3 * num_bytes * matrices[0].size


@pytest.mark.parametrize("num_rows", [2, 100])
def test_without_instructions_few_rows_of_bfloat16_are_exchanged(num_rows: int) -> None:
    x, matrix = _array(num_rows, 24), _array(24, 40)
    fast = optimize(_matmul, processor=PROCESSORS["no bfloat16"])
    (_, output), *_ = _products(jax.make_jaxpr(fast)(x, matrix))
    assert output.dtype == ("float32" if num_rows == 2 else "bfloat16")


def test_all_bytes_are_converted_exactly() -> None:
    matrix = jnp.tile(jnp.arange(-128, 128, dtype="int8"), (256, 1))
    x = jnp.tile(jnp.eye(256, dtype="float32")[:4], (1, 1))
    for processor in PROCESSORS.values():
        fast = optimize(lambda x, y: x @ y.astype(x.dtype), processor=processor)
        np.testing.assert_array_equal(jax.jit(fast)(x, matrix), np.asarray(matrix[:4], "float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [576, 592, 640, 896])
@pytest.mark.parametrize("is_turned", [False, True])
def test_one_row_makes_no_copy_of_a_matrix(is_turned: bool, size: int, dtype: str) -> None:
    matrix = _array(*((2048, size) if is_turned else (size, 2048)), dtype=dtype)

    def loop(x: Any, matrix: Any) -> Any:
        def step(i: Any, x: Any) -> Any:
            product = x @ (matrix.T if is_turned else matrix).astype(x.dtype)
            return jnp.tanh(product[:, :size])

        return jax.lax.fori_loop(0, 5, step, x)

    x = _array(1, size, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    compiled: Any = jax.jit(optimize_for_cpu(loop)).lower(x, matrix).compile()
    sums = 4 * matrix.size // 8
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * sums


def test_one_row_times_a_matrix_with_many_axes() -> None:
    x, y = _array(1, 8, 64, dtype="float32"), _array(8, 64, 96, dtype="float32")
    out = jax.jit(optimize_for_cpu(partial(jnp.einsum, "tnh,nhd->td")))(x, y)
    np.testing.assert_allclose(out, np.einsum("tnh,nhd->td", x, y), rtol=1e-4, atol=1e-4)
    x, y = _array(1, 512, dtype="float32"), _array(512, 8, 64, dtype="float32")
    out = jax.jit(optimize_for_cpu(partial(jnp.einsum, "td,dnh->tnh")))(x, y)
    np.testing.assert_allclose(out, np.einsum("td,dnh->tnh", x, y), rtol=1e-4, atol=1e-4)


def _decode(cache: Any, query: Any, start: Any) -> Any:
    """Steps that write a row of a cache (B, S, K, H), read one, and attend to all."""
    num_slots = cache.shape[1]

    def step(i: Any, carry: Any) -> Any:
        cache, query_BTKGH = carry
        slots = start + i  # of which some lie beyond the cache: those are dropped
        new_BKH = query_BTKGH[:, 0, :, 0]
        rows = jnp.arange(len(cache))
        cache = cache.at[rows, slots].set(new_BKH)
        last = jnp.take_along_axis(cache, (slots % num_slots)[:, None, None, None], axis=1)
        scores = jnp.einsum("bskh,btkgh->bktgs", cache, query_BTKGH)
        attended = jnp.einsum("bskh,bktgs->btkgh", cache, scores / num_slots)
        return cache, jnp.tanh(attended + last[:, :, :, None])

    return jax.lax.while_loop(
        lambda carry: (carry[0] < 4) & (jnp.sum(carry[1][0]) != 7),
        lambda carry: (carry[0] + 1, step(carry[0], carry[1])),
        (jnp.int32(0), (cache, query)),
    )


def _loops(program: Any) -> Iterator[Any]:
    for equation in program.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from _loops(inner.jaxpr)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loop_carries_a_cache_as_its_products_want_it(dtype: str, batch: int) -> None:
    cache = _array(batch, 10, 3, 8, dtype=dtype)
    query = _array(batch, 1, 3, 2, 8, dtype=dtype)
    start = jnp.array([8, 0, -2], "int32")[:batch]
    fast = optimize_for_cpu(_decode)
    expected, result = jax.jit(_decode)(cache, query, start), jax.jit(fast)(cache, query, start)
    tolerance = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(ours, "float32"), np.asarray(theirs, "float32")
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    program = jax.make_jaxpr(fast)(cache, query, start)
    loop = next(_loops(program))
    (carried,) = (x.aval for x in loop.outvars if x.aval.size == cache.size)
    assert carried.shape[-3:] in ((3, 8, 10), (3, 10, 8))
    body = loop.params["body_jaxpr"].jaxpr
    moved = [x.aval for e in body.eqns if e.primitive.name == "transpose" for x in e.outvars]
    assert all(x.size < cache.size for x in moved)


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_is_written_without_a_copy_of_the_cache(batch: int, num_heads: int) -> None:
    cache = _array(batch, 256, num_heads, 64, dtype="float32")
    query = _array(batch, 1, num_heads, 2, 64, dtype="float32")
    start = jnp.array([8, 0, -2], "int32")[:batch]
    compiled = jax.jit(optimize_for_cpu(_decode)).lower(cache, query, start).compile()
    text = compiled.as_text() or ""
    (body,) = re.findall(r"body=%([\w.-]+)", text[text.index("ENTRY") :])
    (steps,) = re.findall(rf"^%{re.escape(body)} .*?^}}", text, re.DOTALL | re.MULTILINE)
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|fusion)\(", steps)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    num_writes = 1 if batch == 1 else 0  # of several rows, a loop in the loop writes each
    assert sizes.count(cache.size) == num_writes
