"""Bodies: what a CompositeLayer can be made of."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import tree

from functional_llm.graph.input_specs import dotted, input_spec_of, make_inputs
from functional_llm.graph.signature import Signature
from functional_llm.graph.types import Nested

Body: TypeAlias = Callable[[Nested], Nested]  # symbolic inputs in, symbolic outputs out


class BuiltGraph(NamedTuple):
    """A graph that a composite can take over as it is.

    Args:
        graph: Functional model with flat inputs and outputs.
        signature: The structures that the composite takes and returns.
        attributes: What to set on the composite.
    """

    graph: keras.Model
    signature: Signature
    attributes: dict[str, Any]


class LayerSequence:
    """A body that applies layers in order. Not a list attribute: Keras would track it twice."""

    def __init__(self, layers: Sequence[Body]) -> None:
        self.layers = list(layers)

    def __call__(self, inputs: Nested) -> Nested:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


class ExistingGraph:
    """A body whose graph is not traced: it is that of a model, of a file, or of another layer.

    Args:
        make: Returns the graph. `None` for a placeholder, which a constructor is given while the
            graph that belongs to the layer is yet to be loaded.
    """

    def __init__(self, make: Callable[[], BuiltGraph] | None) -> None:
        self._make = make

    def take(self) -> BuiltGraph:
        """Returns the graph, once; then lets go of what it was made from."""
        if self._make is None:
            raise RuntimeError(
                "The layer is being loaded: expected its constructor not to build it. Build "
                "layers at their first call."
            )
        made, self._make = self._make(), None
        return made

    def __call__(self, inputs: Nested) -> Nested:  # constructors may ask for a callable
        raise RuntimeError("The graph exists already: expected no call of the body.")


def as_body(body: object) -> Body | None:
    """Returns what a composite was given as a callable body.

    Raises:
        TypeError: If it is no function, list of layers or functional model, or a function that
            cannot be called with the inputs.
    """
    if body is None or isinstance(body, (LayerSequence, ExistingGraph)):
        return body
    if isinstance(body, (list, tuple)) and body and all(callable(x) for x in body):
        for part in body:
            check_takes_inputs(part)
        return LayerSequence(body)
    if is_functional(body):
        return ExistingGraph(lambda: _with_flat_inputs(body))
    if callable(body) and not isinstance(body, keras.layers.Layer):
        check_takes_inputs(body)
        return body
    raise TypeError(
        "CompositeLayer expects a function, a non-empty list of layers or a functional model. "
        f"Received: {body!r} of type {type(body).__name__}. A single layer goes into a list."
    )


def check_takes_inputs(body: Callable[..., Any]) -> None:
    """Refuses a body that cannot be called with one argument, the nested inputs.

    Raises:
        TypeError: If it cannot.
    """
    if isinstance(body, type):
        raise TypeError(
            f"Expected a layer or a function of the inputs, received the class {body.__name__}, "
            "which takes arguments of its own: make a layer of it."
        )
    try:
        signature = inspect.signature(body)
    except (TypeError, ValueError):  # of a builtin that does not say what it takes
        return
    try:
        signature.bind(None)
    except TypeError as error:
        name = getattr(body, "__qualname__", body)
        raise TypeError(
            f"CompositeLayer calls its body with one argument, the inputs, which may be nested. "
            f"Expected a body that takes them, received {name}{signature}: {error}."
        ) from None


def is_functional(layer: object) -> bool:
    """Whether something is a model that has a graph: Functional, or a Sequential that is built."""
    if isinstance(layer, keras.Sequential):
        return layer.built and hasattr(layer, "inputs")
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function)


def no_graph_yet(name: str) -> ValueError:
    """Returns an error about a layer that is not built."""
    return ValueError(
        f"'{name}' has no graph yet. Expected a built layer: call it, or `build(shape)` it, first."
    )


def trace(body: Body, specs: Nested, name: str) -> tuple[keras.Model, Signature]:
    """Runs a body once, on symbolic inputs.

    Args:
        body: The body.
        specs: Structure of InputSpecs, `None` where an input is absent.
        name: Name of the graph, and of the layer in messages.

    Returns:
        A functional model with flat inputs and outputs, and their structures.

    Raises:
        ValueError: If there is no input, or the body returns anything but symbolic tensors that
            are made from its inputs.
    """
    arguments = make_inputs(specs)
    present = [x for x in tree.flatten(arguments) if x is not None]
    if not present:
        raise ValueError(
            f"'{name}' is to be built without any input. Expected at least one tensor or "
            f"shape, received {specs!r}. Call the layer with a tensor first."
        )
    outputs = body(arguments)
    for path, output in tree.flatten_with_path(outputs):
        if not isinstance(output, keras.KerasTensor):
            place = f" at '{dotted(path)}'" if path else ""
            raise ValueError(
                f"The body of '{name}' returned {output!r}{place}. Expected symbolic "
                "tensors made from its inputs; leave out what may be None."
            )
    try:
        graph = keras.Model(present, tree.flatten(outputs), name=name)
    except ValueError as error:
        raise ValueError(
            f"The body of '{name}' gave no graph from its inputs to its outputs: {error} "
            "Give the body all tensors it uses as inputs, and its layers different names."
        ) from error
    return graph, Signature(specs, outputs)


def _with_flat_inputs(model: keras.Model) -> BuiltGraph:
    """The graph of a model with flat inputs and outputs, and the structure they had."""
    inputs, outputs = model.inputs, model.outputs
    if isinstance(model, keras.Sequential):  # its `input` is what it was called with elsewhere
        signature = Signature(input_spec_of(inputs[0]), outputs[0])
    else:
        signature = Signature(tree.map_structure(input_spec_of, model.input), model.output)
    return BuiltGraph(keras.Model(inputs, outputs, name=model.name), signature, {})
