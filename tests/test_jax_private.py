"""What the package uses of JAX without a promise: a test for each line, to say what JAX moved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from functional_llm.xla import jax_private
from functional_llm.xla.jax_private import Equation, Loop, Program

VECTOR = jnp.arange(3.0)


def _trace(function: Any, *inputs: Any) -> Program:
    return jax.jit(function).trace(*inputs).jaxpr


def _only(function: Any, *inputs: Any) -> Equation:
    (equation,) = _trace(function, *inputs).jaxpr.eqns
    return equation


def _count(x: Any) -> Any:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]


def test_a_traced_function_gives_its_program_and_the_structure_of_its_result() -> None:
    traced = jax.jit(lambda x: {"y": x}).trace(VECTOR)
    assert isinstance(traced.jaxpr, Program)
    assert jax.tree.unflatten(jax.tree.structure(traced.out_info), [1]) == {"y": 1}


def test_a_program_has_constants_inputs_equations_and_results() -> None:
    program = _trace(lambda x: x + np.arange(3, dtype="float32"), VECTOR)
    assert len(program.jaxpr.constvars) == len(program.consts)
    assert [x.shape for x in program.in_avals] == [(3,)]
    assert len(program.jaxpr.invars) == len(program.jaxpr.outvars) == 1
    assert isinstance(program.jaxpr.invars[0], jax_private.Variable)


def test_programs_are_made_of_open_ones() -> None:
    program = jax.make_jaxpr(lambda x: x + 1)(VECTOR)
    assert isinstance(program, jax_private.PROGRAMS)
    assert isinstance(program.jaxpr, jax_private.OpenProgram)
    assert isinstance(Program(program.jaxpr, ()), Program)


def test_a_rematerialised_function_holds_an_open_program() -> None:
    gradient = jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x) ** 2)))
    params = [e.params for e in jax.make_jaxpr(gradient)(VECTOR).jaxpr.eqns]
    assert any(isinstance(p.get("jaxpr"), jax_private.PROGRAMS) for p in params)


def test_literals_have_a_value() -> None:
    (literal,) = (
        x for x in _only(lambda x: x + 1, VECTOR).invars if isinstance(x, jax_private.Literal)
    )
    assert literal.val == 1


def test_variables_have_a_shape_and_a_dtype() -> None:
    shape = jax_private.shape_of(_only(lambda x: x + 1, VECTOR).invars[0])
    assert (shape.shape, shape.dtype, shape.ndim, shape.size) == ((3,), jnp.float32, 1, 3)


PRIMITIVES = {
    "convert_element_type_p": lambda x: lax.convert_element_type(x, "int32"),
    "dot_general_p": lambda x: lax.dot_general(x, x, (((0,), (0,)), ((), ()))),
    "gather_p": lambda x: lax.gather(
        x,
        np.array([[0]]),
        lax.GatherDimensionNumbers((), (0,), (0,)),
        (1,),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    ),
    "jit_p": lambda x: jax.jit(jnp.sin)(x),
    "transpose_p": lambda x: lax.transpose(x[None], (1, 0)),
    "while_p": _count,
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_are_those_of_the_functions(name: str) -> None:
    equations = _trace(PRIMITIVES[name], VECTOR).jaxpr.eqns
    assert getattr(jax_private, name) in [equation.primitive for equation in equations]


def test_scatter_is_what_writes_rows() -> None:
    equations = _trace(lambda x: x.at[np.array([0, 5])].set(1.0), VECTOR).jaxpr.eqns
    (equation,) = (e for e in equations if e.primitive is jax_private.scatter_p)
    assert equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    numbers = equation.params["dimension_numbers"]
    assert numbers.scatter_dims_to_operand_dims == numbers.inserted_window_dims == (0,)
    assert (numbers.operand_batching_dims, numbers.update_window_dims) == ((), ())


def test_gather_has_the_parameters_that_are_changed() -> None:
    equations = _trace(PRIMITIVES["gather_p"], VECTOR).jaxpr.eqns
    (equation,) = (e for e in equations if e.primitive is jax_private.gather_p)
    assert {"dimension_numbers", "slice_sizes", "fill_value"} <= set(equation.params)
    numbers = equation.params["dimension_numbers"]
    assert numbers._replace(start_index_map=(0,)) == numbers
    assert (numbers.collapsed_slice_dims, numbers.operand_batching_dims) == ((0,), ())


def test_a_product_has_dimension_numbers_and_a_preferred_dtype() -> None:
    params = _only(PRIMITIVES["dot_general_p"], VECTOR).params
    assert params["dimension_numbers"] == (((0,), (0,)), ((), ()))
    assert params["preferred_element_type"] in (None, jnp.float32)


def test_a_primitive_is_applied() -> None:
    params = _only(PRIMITIVES["dot_general_p"], VECTOR).params
    assert jax_private.apply(jax_private.dot_general_p, VECTOR, VECTOR, **params) == 5


@pytest.mark.parametrize("function", [jnp.cumsum, jax.nn.relu, jax.checkpoint(jnp.sin)])
def test_an_equation_is_bound_again(function: Any) -> None:
    equation = _only(function, VECTOR)
    (output,) = jax_private.bind_again(equation, [VECTOR], equation.params)
    np.testing.assert_array_equal(output, function(VECTOR))


def test_a_compiled_function_has_a_program() -> None:
    equation = _only(PRIMITIVES["jit_p"], VECTOR)
    assert isinstance(jax_private.inner_program(equation), Program)


def test_a_loop_has_two_programs_and_runs_with_others() -> None:
    loop = Loop(_only(_count, VECTOR))
    assert (loop.num_cond_constants, loop.num_body_constants) == (0, 0)
    more = jax.make_jaxpr(lambda i, x: (i + 1, x * 3))(0, VECTOR)
    assert len(loop.body.jaxpr.outvars) == len(more.jaxpr.outvars)
    _, result = loop.run(loop.cond, more, [jnp.int32(0), VECTOR])
    np.testing.assert_array_equal(result, VECTOR * 27)


def test_processes_have_a_blackboard() -> None:
    """Several of them write and read there: tests/test_processes.py."""
    assert jax_private.blackboard() is None  # this one is alone
    client = jax_private.distributed.global_state
    assert {"client", "process_id", "num_processes"} <= set(dir(client))
