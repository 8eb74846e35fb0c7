"""All that this library uses of Keras without a public name, each in one function.

A docstring says what Keras does not offer publicly. tests/test_keras_private.py has a test for each
of them, which fails when Keras moves what is behind it; no other module touches these names.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, TypeVar

import keras
from keras import tree
from keras.src.models import cloning
from keras.src.utils import traceback_utils

from functional_llm.graph.types import JSON, Layer, Nested, Tensor

Model = TypeVar("Model", bound=keras.Model)


# Graphs.


@dataclass(frozen=True, eq=False)
class Call:
    """One call in a graph.

    Args:
        operation: The layer or operation that was called.
        args: Its positional arguments.
        kwargs: Its other arguments; Keras notes masks here that nobody gave.
        inputs: All symbolic tensors among the arguments.
        outputs: The symbolic tensors it returned, flat.
    """

    operation: keras.Operation
    args: tuple[Nested, ...]
    kwargs: dict[str, Nested]
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]

    def with_tensors(
        self, tensors: Mapping[int, Tensor]
    ) -> tuple[tuple[Nested, ...], dict[str, Nested]]:
        """Returns the arguments with other tensors in them.

        Args:
            tensors: The id of a symbolic tensor of the graph -> what comes in its place; `None`
                comes in the place of those that have no entry.
        """

        def replace(x: Tensor) -> Tensor:
            return tensors.get(id(x)) if isinstance(x, keras.KerasTensor) else x

        args, kwargs = tree.map_structure(replace, (self.args, self.kwargs))
        return args, kwargs


def calls(graph: keras.Model) -> Iterator[Call]:
    """Yields the calls in a graph, in an order in which they can be run.

    Keras has `operations`, but no public list of their calls, nor of the arguments of each.
    """
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if not node.is_input:
                arguments = node.arguments
                yield Call(
                    node.operation,
                    arguments.args,
                    arguments.kwargs,
                    arguments.keras_tensors,
                    node.outputs,
                )


def record_call(
    operation: keras.Operation,
    args: Iterable[Nested],
    kwargs: Mapping[str, Nested],
    specs: Iterable[keras.KerasTensor],
) -> list[keras.KerasTensor]:
    """Adds a call to the graph without tracing it, which takes most of the time of building.

    Keras has no public way to note a call whose outputs are known: `symbolic_call` always asks
    `compute_output_spec`.

    Args:
        operation: What is called.
        args: Its positional arguments.
        kwargs: Its other arguments.
        specs: Tensors of the shapes and dtypes that the outputs have.

    Returns:
        The outputs, flat.
    """
    outputs = [keras.KerasTensor(x.shape, x.dtype, x.sparse) for x in specs]
    set_untracked(operation, "compute_output_spec", lambda *args, **kwargs: outputs)
    try:
        return keras.Operation.symbolic_call(operation, *args, **kwargs)
    finally:
        del vars(operation)["compute_output_spec"]


def is_optional_input(x: keras.KerasTensor) -> bool:
    """Whether a tensor may be `None` when the graph runs.

    It comes from `keras.Input(..., optional=True)`, or from a layer that says `may_return_none`. No
    public way leads from a tensor to what made it.
    """
    history = getattr(x, "_keras_history", None)
    if history is None:
        return False
    layer = history.operation
    return bool(getattr(layer, "optional", False) or getattr(layer, "may_return_none", False))


def make_optional(x: keras.KerasTensor) -> None:
    """Makes the `keras.Input` that a tensor comes from optional; `clone_model` forgets that."""
    if hasattr(x._keras_history.operation, "optional"):
        x._keras_history.operation.optional = True


def mask_of(x: Tensor) -> Tensor | None:
    """Returns the mask that travels with a tensor, if any. Keras has no public reader."""
    return getattr(x, "_keras_mask", None)


def make_functional(
    cls: type[Model], inputs: Nested, outputs: Nested, name: str | None = None
) -> Model:
    """Returns a functional model of a class, whose own constructor does not run.

    `keras.Model(inputs, outputs)` is an instance of a class without a public name, and only the
    constructor of that one makes the graph.
    """
    stock = keras.Model(inputs, outputs, name=name)
    if cls is type(stock):
        return stock
    without_types: Any = cls
    new: Model = without_types.__new__(cls)
    type(stock).__init__(new, inputs, outputs, name=name)
    return new


def failed_operation(error: BaseException) -> keras.Operation | None:
    """Returns the outermost operation in whose call an exception was raised.

    The exception does not say it, but the traceback has the frame of the call's wrapper.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called = None
        if frame.f_code.co_filename == traceback_utils.__file__:
            called = (frame.f_locals.get("args") or (None,))[0]
        elif frame.f_code.co_name == "__call__":
            called = frame.f_locals.get("self")
        if isinstance(called, keras.Operation):
            return called
    return None


def in_recursive_clone() -> bool:
    """Whether `clone_model(recursive=True)` runs with functions of a user: no layer is told so."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is cloning.clone_model.__code__ and frame.f_locals["recursive"]:
            wrapper, call = frame.f_locals["clone_function"], frame.f_locals["call_function"]
            clone = inspect.getclosurevars(wrapper).nonlocals["clone_function"]
            return call is not None or clone.__module__ != cloning.__name__
        frame = frame.f_back
    return False


# The state of layers.


def share_state(layer: keras.Operation, new: keras.Operation) -> None:
    """Gives a new object the attributes of another, variables included, but calls of its own.

    Keras copies a layer only by its config, with other variables.

    Args:
        layer: A built layer, or any other operation.
        new: Of the same class, made by `__new__` alone.
    """
    for key, value in vars(layer).items():
        if key in _STATE_OF_EACH:
            make = _STATE_OF_EACH[key]
            value = vars(new)[key] if make is None else make()
        elif isinstance(value, MethodType) and value.__self__ is layer:
            value = MethodType(value.__func__, new)
        set_untracked(new, key, value)  # the tracker of variables is shared, and complete


def copy_state(layer: keras.Operation, new: keras.Operation, copied: Callable[[Any], Any]) -> None:
    """Gives a new object copies of the attributes of another, but calls of its own.

    Keras copies a layer only by its config: without weights, and without what it shares. `new` is
    made by `__new__` alone; `copied` is value -> its copy, with containers that are not tracked.
    """
    tracker = vars(layer).get("_tracker")
    stores: set[str] = set()
    if tracker is not None:
        new._initialize_tracker()
        stores = {"_tracker", *(f"_{name}" for name in tracker.config)}
        for name, (_, values) in tracker.config.items():
            for value in values:
                new._tracker.add_to_store(name, copied(value))
    for key, value in vars(layer).items():
        if key in stores:
            continue
        if key in _STATE_OF_EACH:
            make = _STATE_OF_EACH[key]
            set_untracked(new, key, vars(new)[key] if make is None else make())
            continue
        other = copied(value)
        set_untracked(new, key, new._tracker.track(other) if hasattr(value, "tracker") else other)
    if tracker is not None and tracker.locked:
        new._lock_state()


def copy_variable(variable: keras.Variable, memo: dict[int, Any]) -> keras.Variable:
    """Returns a variable like this one with a copy of its value, as `copy.deepcopy` makes it.

    That one would copy what says how the value is distributed, devices included.
    """
    new = copy.copy(variable)
    new._value = copy.deepcopy(variable._value, memo)
    return new


# What two layers must not share; `None` stands for what `__new__` has made.
_STATE_OF_EACH: dict[str, Callable[[], Any] | None] = {
    "_inbound_nodes": list,
    "_outbound_nodes": list,
    "_losses": list,
    "_loss_ids": set,
    "_losses_override": list,
    "build": None,
    "quantize": None,
}


def is_of_each(attribute: str) -> bool:
    """Whether an attribute of a layer says which one it is, not what it computes.

    Its name, its calls in graphs, and the arguments that Keras has recorded, the name among them.
    """
    return attribute in ("name", "_inbound_nodes", "_outbound_nodes", "_auto_config")


def set_untracked(layer: keras.Operation, name: str, value: Any) -> None:
    """Sets an attribute past the `__setattr__` of Keras.

    That one adds layers and variables to those of the layer, and refuses to once it is built.
    """
    vars(layer)[name] = value


def exchange_variables(layer: Layer, new: Mapping[int, keras.Variable]) -> None:
    """Puts other variables into the places of some that a layer has.

    Keras has no public way to give a built layer another variable.

    Args:
        layer: A layer whose attributes are its own, as of a shared copy.
        new: Id of a variable of the layer -> what comes in its place.
    """
    for name, value in list(vars(layer).items()):
        if isinstance(value, keras.Variable) and id(value) in new:
            set_untracked(layer, name, new[id(value)])
        elif isinstance(value, list) and any(id(x) in new for x in value):
            set_untracked(layer, name, [new.get(id(x), x) for x in value])


def freeze_layer_only(layer: Layer) -> None:
    """Makes a layer's config say that it does not train; its variables stay as they are.

    The public setter of `trainable` tells the variables too, which other layers may share.
    """
    set_untracked(layer, "_trainable", False)


def quantized_matrix(layer: Layer) -> keras.Variable:
    """Returns the integers of a quantised Dense or Embedding as they are stored.

    The public `kernel` and `embeddings` unpack int4, and add the LoRA of Keras without regard to
    the scale of the integers.
    """
    return layer._embeddings if isinstance(layer, keras.layers.Embedding) else layer._kernel


def set_packed_kernel(layer: Layer, packed: keras.Variable, shape: tuple[int, int]) -> None:
    """Gives a Dense that Keras takes for a quantised one its int4 kernel.

    Args:
        layer: The layer, while Keras builds it.
        packed: Two integers in a byte.
        shape: Of the unpacked ones.
    """
    layer._kernel = packed
    layer._orig_input_dim, layer._orig_output_dim = shape
    layer._is_quantized = True


# Arguments and attributes.


def recorded_arguments(layer: Layer) -> JSON | None:
    """Returns the arguments that a layer was made with, `None` if Keras could not record them.

    They stand in `get_config` only for classes that do not override it.
    """
    return None if layer._auto_config is None else dict(layer._auto_config.config)


def copy_recorded_arguments(layer: Layer, new: Layer) -> None:
    """Gives a copy of a layer the arguments that the layer was made with.

    Keras records them in `__new__` and has no public way to set them.
    """
    new._auto_config = layer._auto_config


def own_attributes(layer: Layer, names: frozenset[str]) -> dict[str, Any]:
    """Returns the attributes of a layer, without those of the given names.

    With torch, Keras's layers are torch modules, which keep layers in a dict of their own.
    """
    attributes = {**vars(layer), **vars(layer).get("_modules", {})}
    return {key: x for key, x in attributes.items() if key not in names}


def nested_layers(layer: Layer) -> list[Layer]:
    """Returns all layers inside, however deep, in the order in which Keras finds them.

    KerasHub counts layers in this order in its files of adapters. Keras has no public list of it.
    """
    return list(layer._flatten_layers(include_self=False))


def own_metrics(layer: Layer) -> list[keras.Metric]:
    """Returns the metrics of a layer. The public `metrics` adds those of the layers inside."""
    return list(layer._metrics)


def names_on_layer(layer: Layer) -> frozenset[str]:
    """Returns the names of all attributes on a new layer, and those that Keras sets later.

    Keras does not say which attributes of a layer are its own and which are the user's.
    """
    return frozenset([*vars(layer), "_torch_params"])


@cache
def names_on_every_model() -> frozenset[str]:
    """Returns the names of all attributes that Keras sets on a functional model.

    Those that it sets when the model is compiled and fitted are listed here: to find them by
    compiling a model, JAX would compile programs for an optimizer's numbers.
    """
    x = keras.Input((1,))
    of_compile = {"_compile_config", "_compiled_trainable_state", "optimizer", "stop_training"}
    of_fit = {"history", "_jax_state", "_eval_epoch_iterator", "_compiled_metrics"}
    of_fit |= {"stop_evaluating", "stop_predicting"}
    return names_on_layer(keras.Model(x, x)) | of_compile | of_fit


# Optimizers.


def accumulation_variables(
    optimizer: keras.optimizers.Optimizer,
) -> tuple[keras.Variable, list[keras.Variable]]:
    """Returns what an optimizer with `gradient_accumulation_steps` keeps between batches.

    Keras's `iterations` counts steps, and the sums have no public name.

    Returns:
        The number of batches so far, and the sums of gradients; none before it is built.
    """
    sums = getattr(optimizer, "_accumulated_gradients", [])
    return optimizer._iterations, [x for x in sums if x is not None]
