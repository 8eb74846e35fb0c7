"""Copies of layers and graphs with weights of their own.

A copy shares nothing with the original that can change. What shared a weight, a generator of random
numbers or a layer before, shares its copy: `memo`, that of `copy.deepcopy`, has the id of each
original -> its copy.
"""

import copy
import functools
import inspect
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import keras

from functional_llm.graph.bodies import LayerSequence
from functional_llm.graph.cloning import clone_graph
from functional_llm.graph.keras_private import (
    copy_state,
    copy_variable,
    freeze_layer_only,
    make_functional,
    names_on_every_model,
    own_attributes,
)
from functional_llm.graph.types import Layer

Memo: TypeAlias = dict[int, Any]

_STATE = (keras.Operation, keras.Variable, keras.random.SeedGenerator, keras.Metric)
_UNCHANGING = (type, ModuleType, inspect.Signature, keras.KerasTensor, keras.DTypePolicy)


def copy_layer(layer: Layer, memo: Memo) -> Layer:
    """Returns a copy of a layer or operation, by its attributes: no class need be registered."""
    if id(layer) not in memo:
        if isinstance(layer, keras.Model):
            memo[id(layer)] = _copy_model(layer, memo)
        else:
            cls: Any = type(layer)
            new = memo[id(layer)] = cls.__new__(cls)  # before what may lead back to it
            copy_state(layer, new, lambda value: copy_value(value, memo))
    return memo[id(layer)]


def copy_value(value: Any, memo: Memo) -> Any:
    """Returns a copy of anything that a layer may keep; containers become plain ones.

    Args:
        value: An attribute.
        memo: The copies made so far.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, _UNCHANGING):
        return value
    if not _is_of_a_kind(value):
        return copy.deepcopy(value, memo)
    if isinstance(value, keras.Operation):
        return copy_layer(value, memo)
    if isinstance(value, (list, set, tuple, dict)):
        return _copy_container(value, memo)
    if isinstance(value, FunctionType):
        return _copy_function(value, memo)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, copy_value(value.__self__, memo))
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        function, args, keywords = (copy_value(part, memo) for part in parts)
        return functools.partial(function, *args, **keywords)
    if isinstance(value, keras.Variable):
        memo[id(value)] = copy_variable(value, memo)
    elif isinstance(value, keras.Metric):
        memo[id(value)] = _with_values(type(value).from_config(value.get_config()), value, memo)
    else:  # an object of a plain class
        new = memo[id(value)] = object.__new__(type(value))
        for key, x in vars(value).items():
            object.__setattr__(new, key, copy_value(x, memo))
    return memo[id(value)]


def _is_of_a_kind(value: Any) -> bool:
    """Whether `copy_value` knows how to look into a value; `copy.deepcopy` does the others."""
    kinds = (*_STATE, list, set, tuple, dict, FunctionType, MethodType, functools.partial)
    if isinstance(value, (*kinds, LayerSequence)):
        return True
    cls: Any = type(value)
    is_plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    has_slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    copies_itself = hasattr(cls, "__deepcopy__") or has_slots
    return hasattr(value, "__dict__") and is_plain and not copies_itself


def _copy_container(value: Any, memo: Memo) -> Any:
    if isinstance(value, dict):
        is_plain = type(value) is dict or hasattr(value, "tracker")
        new: dict[Any, Any] = {} if is_plain else copy.copy(value)
        new.update((key, copy_value(x, memo)) for key, x in value.items())
        return new
    copies = [copy_value(x, memo) for x in value]
    if isinstance(value, tuple):
        return type(value)(*copies) if hasattr(value, "_replace") else tuple(copies)
    return set(copies) if isinstance(value, set) else copies


def _copy_function(function: FunctionType, memo: Memo) -> FunctionType:
    """Returns a function that holds copies of the layers and weights which this one holds."""
    if not _holds_state(function, set()):
        return function
    old_cells = function.__closure__ or ()
    cells = tuple(CellType() for _ in old_cells)
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells or None
    )
    memo[id(function)] = new
    new.__defaults__ = copy_value(function.__defaults__, memo)
    new.__kwdefaults__ = copy_value(function.__kwdefaults__, memo)
    for cell, old in zip(cells, old_cells, strict=True):
        if not _is_empty(old):
            content = old.cell_contents
            holds = _holds_state(content, set())
            cell.cell_contents = copy_value(content, memo) if holds else content
    return new


def _holds_state(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, (*_STATE, LayerSequence)):
        return True
    if isinstance(value, MethodType):
        return _holds_state(value.__self__, seen)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        inside = [*cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, functools.partial):
        inside = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        inside = list(value.values())
    else:
        inside = list(value) if isinstance(value, (list, set, tuple)) else []
    return any(_holds_state(x, seen) for x in inside)


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:  # what it is for has no value yet
        return True


def _copy_model(model: keras.Model, memo: Memo) -> keras.Model:
    if isinstance(model, keras.Sequential) and model.built:
        return keras.models.clone_model(model, clone_function=lambda inner: copy_layer(inner, memo))
    if not isinstance(model, keras.Function):
        new = type(model).from_config(model.get_config())
        config = model.get_build_config()
        if model.built and config and not new.built:
            new.build_from_config(config)
        return _with_values(new, model, memo)
    stateful = (keras.Variable, keras.random.SeedGenerator)
    clone = clone_graph(
        model,
        lambda layer: copy_layer(layer, memo),
        replace=lambda x: copy_value(x, memo) if isinstance(x, stateful) else x,
    )
    new = clone
    if type(clone) is not type(model):
        new = make_functional(type(model), clone.input, clone.output, model.name)
    for key, value in own_attributes(model, names_on_every_model()).items():
        setattr(new, key, copy_value(value, memo))
    if not model.trainable:
        freeze_layer_only(new)
    return new


def _with_values(new: Any, original: Any, memo: Memo) -> Any:
    for variable, new_variable in zip(original.variables, new.variables, strict=True):
        # A copy: training one model donates its arrays, which would delete the other's.
        new_variable.assign(keras.ops.copy(variable))
        memo.setdefault(id(variable), new_variable)
    return new
