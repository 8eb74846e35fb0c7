"""What this library uses of Keras without a public name, to keep the values of variables.

The second half of `keras_private.py`, with the same rules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import keras
from keras import tree
from keras.src.backend.common import global_state
from keras.src.utils import jax_utils

from functional_llm.graph.keras_private import set_untracked
from functional_llm.graph.types import Nested, Tensor

_State = tuple[list[Tensor], ...]  # of a step: the values of variables, in groups


@contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, variables are made without values: whoever makes them must assign every one.

    That spares loading a checkpoint the random values, and the memory for them. Keras remembers
    such variables, to initialise them when a later scope ends, and has no public way to forget.
    It also makes new values whenever one of them is read that has none: that is an error now.
    """
    with keras.StatelessScope(initialize_variables=False):
        yield
    for variable in global_state.get_global_attribute("uninitialized_variables") or ():
        variable._initializer = no_value
        if keras.backend.backend() == "jax":  # of the distribution that is set, as for any other
            variable._initialize_layout()
    global_state.set_global_attribute("uninitialized_variables", [])


def sharding_of(variable: keras.Variable) -> jax.sharding.Sharding:
    """Returns where a variable lies on the mesh of the distribution that is set.

    Keras gives an optimizer's variables the layout of the weights that they belong to, and asks the
    distribution only for others.
    """
    variable._initialize_layout()
    layout: Any = variable._layout
    return getattr(layout, "backend_layout", layout)


def has_value(variable: keras.Variable) -> bool:
    """Returns whether a variable has a value, which one made by `uninitialized` may not have."""
    return variable._value is not None


def no_value(shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
    """Stands for the initial value of a variable that must not have one."""
    if jax_utils.is_in_jax_tracing_scope():  # only shapes and dtypes are asked for
        return keras.ops.zeros(shape, dtype)
    raise RuntimeError(
        f"A weight of shape {tuple(shape)} has no value: it was not loaded yet, or its value was "
        "lost when a step of `fit` failed while it ran. Load the model again, or its weights."
    )


@contextmanager
def kept_values(model: keras.Model) -> Iterator[None]:
    """Inside, `fit`, `evaluate`, `predict` and their like leave a model with values if they fail.

    With JAX, Keras takes the values out of the variables before a step, and puts them back at the
    end: after a failure only in `fit`, and only if one step was done. What a step was given to
    write its results into is gone if it fails while it runs: those variables have no value then.
    """
    if keras.backend.backend() != "jax" or "_get_jax_state" in vars(model):
        return (yield)
    taken: list[tuple[keras.Variable, Tensor]] = []
    get_state = model._get_jax_state

    def get_state_and_remember(**kwargs: Any) -> Any:
        of_optimizer = getattr(getattr(model, "optimizer", None), "variables", ())
        variables = (*model.variables, *model.metrics_variables, *of_optimizer)
        taken[:] = [(variable, variable._value) for variable in variables]
        return get_state(**kwargs)

    set_untracked(model, "_get_jax_state", get_state_and_remember)
    try:
        yield
    except BaseException as error:
        state = getattr(model, "_jax_state", None) or {}
        if taken and not any(map(_is_gone, tree.flatten(list(state.values())))):
            model.jax_state_sync()  # what the last step has made
        model._jax_state = None
        for variable, value in taken:
            if variable._value is None or _is_gone(variable._value):
                variable._value = value
        lost = [variable for variable, _ in taken if _is_gone(variable._value)]
        for variable in lost:
            variable._value, variable._initializer = None, no_value
        if lost:
            error.add_note(
                f"The step failed while it ran, and with it went the values of {len(lost)} "
                f"variables that it changes ({lost[0].path} ...). Load them again, from a "
                "checkpoint or with the model."
            )
        raise
    finally:
        del vars(model)["_get_jax_state"]


def _is_gone(value: Tensor) -> bool:
    """Whether JAX has deleted an array, or the program that was to make it has failed."""
    try:
        jax.block_until_ready(value)
    except (RuntimeError, ValueError):  # for either reason
        return True
    return False


@contextmanager
def donating(*groups: int) -> Iterator[None]:
    """Inside, models make steps that write their results into these groups of their state only.

    Keras lets a compiled step write into all of it, weights that are frozen or only read among
    them, and its arguments are gone if the step fails. The others are neither written into nor
    returned: to return them unchanged would copy them.

    Args:
        *groups: Of the state of a `train_step`: 0 trainable variables, 1 others, 2 the optimizer's,
            3 metrics; of `test_step` and `predict_step` fewer.
    """
    if keras.backend.backend() != "jax":
        return (yield)
    from keras.src.backend.jax import trainer

    compile_step = trainer.jit

    def compile_with_kept(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if "donate_argnums" not in options:  # not a step
            return compile_step(step, **options)

        shardings = options.pop("out_shardings", None)
        if shardings is not None:
            chosen = (x if i in groups else None for i, x in enumerate(shardings[1]))
            shardings = shardings[0], tuple(chosen)
        step_of_groups = StepOfGroups(step, groups)
        program = compile_step(step_of_groups, out_shardings=shardings, **options)

        def call(state: _State, data: Nested) -> tuple[Nested, _State]:
            given, kept = step_of_groups.split(state)
            logs, new = program(given, kept, data)
            return logs, tuple(map(_completed, kept, new))

        return call

    trainer.jit = compile_with_kept
    try:
        yield
    finally:
        trainer.jit = compile_step


@dataclass(frozen=True)
class StepOfGroups:
    """A step whose state comes in two parts, the first for its results to be written into.

    Equal ones are one program for JAX.

    Args:
        step: From a state and data to logs and the new state.
        groups: The groups of the state that are in the first part.
    """

    step: Callable[..., Any]
    groups: tuple[int, ...]

    def __call__(self, given: Nested, kept: Nested, data: Nested) -> tuple[Nested, Nested]:
        logs, new = self.step(tuple(map(_either, given, kept)), data)
        return logs, tuple(map(_changed, kept, new))

    def split(self, state: _State) -> tuple[Nested, Nested]:
        """Returns the two parts of a state, `None` in the place of what is in the other."""
        given = tuple(x if i in self.groups else None for i, x in enumerate(state))
        return given, tuple(None if i in self.groups else x for i, x in enumerate(state))


def _either(given: Nested, kept: Nested) -> Nested:
    return kept if given is None else given


def _changed(kept: Nested, new: Nested) -> Nested:
    """Returns the new values of a group, `None` for what a step has not changed."""
    if kept is None:
        return new
    return [None if x is old else x for old, x in zip(kept, new, strict=True)]


def _completed(kept: Nested, new: Nested) -> Nested:
    if kept is None:
        return new
    return [old if x is None else x for old, x in zip(kept, new, strict=True)]
