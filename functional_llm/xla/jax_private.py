"""All that the package uses of JAX under names that JAX does not promise to keep.

`tests/test_jax_private.py` has a test for each of them, so that a JAX that moves one is noticed by
its name. `jax.extend` says of itself that it makes no promise of compatibility.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import jax
import numpy as np
from jax._src import distributed
from jax.extend import core
from jax.extend.core import primitives

Program: TypeAlias = core.ClosedJaxpr
OpenProgram: TypeAlias = core.Jaxpr  # its constants have no values; from JAX 0.11 on the same
PROGRAMS = (core.ClosedJaxpr, core.Jaxpr)
Equation: TypeAlias = core.JaxprEqn
Variable: TypeAlias = core.Var
Literal: TypeAlias = core.Literal
Params: TypeAlias = dict[str, Any]

convert_element_type_p = primitives.convert_element_type_p
dot_general_p = primitives.dot_general_p
gather_p = primitives.gather_p
jit_p = primitives.jit_p
scatter_p = primitives.scatter_p
transpose_p = primitives.transpose_p
while_p = primitives.while_p


class Blackboard(Protocol):
    """What processes write for all of them to read: the service that `jax.distributed` starts."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


def blackboard() -> Blackboard:
    """Returns what the processes of `jax.distributed` have in common."""
    return cast(Blackboard, distributed.global_state.client)


class Shaped(Protocol):
    """An array, or its shape and dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...


def shape_of(variable: Variable | Literal) -> Shaped:
    """Returns the shape and dtype of an input or a result of an equation."""
    return cast(Shaped, variable.aval)


def apply(primitive: Any, *inputs: jax.Array, **params: object) -> jax.Array:
    """Returns the one result of a primitive, with parameters as equations have them."""
    return primitive.bind(*inputs, **params)


def bind_again(equation: Equation, inputs: Sequence[jax.Array], params: Params) -> list[jax.Array]:
    """Returns the results of an equation on other inputs and with other parameters."""
    primitive = equation.primitive
    with equation.ctx.manager:
        outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(outputs) if primitive.multiple_results else [outputs]


def inner_program(equation: Equation) -> Program:
    """Returns the program that a call of a compiled function (`jit_p`) runs."""
    return equation.params["jaxpr"]


@dataclass(frozen=True)
class Loop:
    """The parts of an equation `while_p`: its inputs are constants, and what the loop carries.

    Args:
        equation: The equation.
    """

    equation: Equation

    @property
    def cond(self) -> Program:
        """Constants of the condition, what is carried -> whether to go on."""
        return self.equation.params["cond_jaxpr"]

    @property
    def body(self) -> Program:
        """Constants of the body, what is carried -> what is carried."""
        return self.equation.params["body_jaxpr"]

    @property
    def num_cond_constants(self) -> int:
        """How many inputs come first that only the condition reads."""
        return self.equation.params["cond_nconsts"]

    @property
    def num_body_constants(self) -> int:
        """How many inputs follow that only the body reads."""
        return self.equation.params["body_nconsts"]

    def run(self, cond: Program, body: Program, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Runs the loop with another condition, another body and other inputs."""
        params = {**self.equation.params, "cond_jaxpr": cond, "body_jaxpr": body}
        return while_p.bind(*inputs, **params)
