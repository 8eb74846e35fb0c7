"""Rewiring: a new graph with other layers in it, around the same weights.

Keras notes every symbolic call on the layer that is called, and never forgets it. So a rewired
graph calls *shared copies*: objects of the same class, with the same attributes and
`keras.Variable`s, but calls of their own. The original stays as it is, and Python frees a graph
that nobody needs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import keras
from keras import tree

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.freezing import FROZEN, keep_frozen
from functional_llm.graph.input_specs import inputs_like
from functional_llm.graph.keras_private import (
    Call,
    calls,
    make_functional,
    mask_of,
    names_on_every_model,
    own_attributes,
    record_call,
    share_state,
)
from functional_llm.graph.layer_errors import note_path
from functional_llm.graph.layer_paths import map_parts
from functional_llm.graph.selection import Where, inner_graph, inner_layers, select, walk
from functional_llm.graph.shape_changes import ShapeChanges
from functional_llm.graph.types import Layer, Nested, Tensor

ModelT = TypeVar("ModelT", bound=Layer)  # a functional model or a CompositeLayer
OperationT = TypeVar("OperationT", bound=keras.Operation)

Replace: TypeAlias = Callable[[Layer, str], Layer]
CallInstead: TypeAlias = Callable[..., Nested]
Captured: TypeAlias = list[tuple[str, Nested]]  # paths, and the tensors that went through there
Arguments: TypeAlias = tuple[tuple[Nested, ...], dict[str, Nested]]  # positional ones, others


def rewire(
    model: ModelT,
    fn: Replace | None = None,
    *,
    call: CallInstead | None = None,
    where: Where | None = None,
    freeze: bool | None = None,
) -> ModelT:
    """Returns a new model of the same class, with other layers or calls in it.

    ```python
    def wider(layer, path):
        return MyDense(layer) if path.endswith("attention/query") else layer

    new_model = rewire(model, wider)

    def louder(layer, path, *args, **kwargs):
        return layer(*args, **kwargs) * 2

    new_model = rewire(model, call=louder, where="decoder_*/mlp")
    ```

    The new model shares the weights of the original, which stays as it is; it has the same
    attributes and is not compiled. Optional inputs stay optional, a layer used twice is replaced
    once, a CompositeLayer keeps its class, and no graph is built by its `functional_build` again.

    Args:
        model: A functional model or a built CompositeLayer.
        fn: `fn(layer, path)` returns the layer to put there: the same one to leave it, or one that
            may have it inside. Called once for every leaf layer; with `where`, once for every layer
            that matches, those with a graph inside included.
        call: `call(layer, path, *args, **kwargs)` returns the outputs of a call, and may put
            anything before, after or around it; `layer` is the one in the new model. To drop a
            layer, return its argument. Called like `fn`, but once for every call.
        where: Which layers `fn` and `call` are asked about, as for `select`.
        freeze: `True`: the original's weights do not train in the new model (they do in the
            original). `False`: all train. `None`: what is frozen in the original stays frozen.

    Outputs of another width or dtype may only go where replaced layers read them, through
    operations that compute with them, or out of the model.

    Raises:
        TypeError: If the model has no graph, or `fn` returns no layer.
        ValueError: If the model has no graph yet, `where` matches nothing, what comes in a layer's
            place returns other outputs than those that follow can take, or `freeze` is asked of a
            model whose class cannot do that (see `Freezable`).
    """
    layers = dict(walk(model)) if where is None else select(model, where)
    rewiring = Rewiring(model, fn, call, asked=layers)
    new_model = rewiring.result()
    if isinstance(new_model, keras.Model):
        keep_frozen(model, new_model, freeze)
    return new_model


def shared_copy(layer: OperationT) -> OperationT:
    """Returns a layer with the same class, attributes and variables, and no calls noted on it.

    Args:
        layer: A built layer, or any `keras.Operation`.
    """
    cls: Any = type(layer)
    new: OperationT = cls.__new__(cls)
    share_state(layer, new)
    return new


class Rewiring:
    """One run over a model, for `rewire` and for `capture`.

    All its dicts are keyed by the ids of the original's objects.

    Args:
        model: The original.
        fn: As for `rewire`.
        call: As for `rewire`.
        asked: Path -> layer: which layers `fn` and `call` are asked about.
        captured: Path -> layer: which layers' outputs become outputs of the model.
        of_inputs: Whether to capture their inputs instead.
    """

    def __init__(
        self,
        model: Layer,
        fn: Replace | None = None,
        call: CallInstead | None = None,
        asked: Mapping[str, Layer] = MappingProxyType({}),
        captured: Mapping[str, Layer] = MappingProxyType({}),
        of_inputs: bool = False,
    ) -> None:
        self._model = model
        self._root = (model.path or model.name) if isinstance(model, CompositeLayer) else ""
        self._fn = fn
        self._call = call
        self._layers = asked
        self._asked = {id(layer): path for path, layer in asked.items()}
        self._capture_at = {id(layer): path for path, layer in captured.items()}
        self._of_inputs = of_inputs
        self._captured: dict[int, Captured] = {}  # inside each layer that has a graph
        self._known = {id(layer) for _, layer in walk(model, composites=True)}
        self._places: dict[int, Layer] = {}
        self._replaced: dict[int, Layer] = {}
        self._changes = ShapeChanges()

    def result(self) -> Layer:
        """Returns the new model."""
        replaced: list[str] = []
        for path, layer in self._layers.items() if self._fn is not None else ():
            if not any(path.startswith(f"{above}/") for above in replaced):
                new = self._ask(layer, path)
                if new is not layer:
                    self._replaced[id(layer)] = new
                    replaced.append(path)
        return self._container(self._model, "")

    def _scopes(self, path: str) -> AbstractContextManager[None]:
        """What is built inside is named as what stands at this path."""
        return name_scopes(f"{self._root}/{path}".strip("/").rpartition("/")[0])

    def _ask(self, layer: Layer, path: str) -> Layer:
        with self._scopes(path):
            new = self._fn(layer, path) if self._fn is not None else layer
        if not isinstance(new, keras.layers.Layer):
            raise TypeError(
                f"`fn` returned {new!r} for '{path}'. Expected a layer; return the layer itself "
                "to leave it as it is."
            )
        return new

    def _place(self, operation: keras.Operation, path: str) -> keras.Operation:
        """Returns what stands in the new graph for an operation of the old one."""
        if id(operation) not in self._places:
            new = self._replaced.get(id(operation), operation)
            if new is not operation and id(new) in self._known:  # another layer of the model
                place = self._place(new, path)
            elif new is not operation:
                place = new
            elif inner_layers(operation) is None:
                place = shared_copy(operation)
            else:
                place = self._container(operation, path)
            self._places[id(operation)] = place
        return self._places[id(operation)]

    def _container(self, layer: Layer, path: str) -> Layer:
        """Returns a layer or model like this one, around a new graph."""
        is_sequential = isinstance(layer, keras.Sequential)
        if is_sequential and self._call is None and not self._capture_at:
            return self._sequential(layer, path)
        graph = inner_graph(layer)
        if is_sequential:  # only a Functional has a place for calls of another kind
            graph = keras.Model(layer.inputs, layer.outputs, name=layer.name)
        inputs, outputs, captured = self._graph(graph, path)
        self._changes.leave(layer, tree.flatten(outputs))
        self._captured[id(layer)] = captured
        tensors = _captured_tensors(captured)
        if isinstance(layer, CompositeLayer):
            outputs = tree.flatten(outputs)
            structure = (layer.pack_outputs(outputs), tensors) if tensors else None
            with self._scopes(path):
                graph = keras.Model(inputs, [*outputs, *tensors], name=layer.name)
                return layer.with_graph(graph, structure)
        if layer is self._model and captured:
            named = outputs if isinstance(outputs, dict) else {"outputs": outputs}
            outputs = {**named, "captured": _by_path(captured)}
        elif captured:
            outputs = (outputs, tensors)
        return self._like(graph, inputs, outputs)

    def _sequential(self, layer: keras.Sequential, path: str) -> keras.Sequential:
        graph = keras.Model(layer.inputs, layer.outputs, name=layer.name)
        _, outputs, _ = self._graph(graph, path)  # which compares shapes
        self._changes.leave(layer, tree.flatten(outputs))
        layers = [self._place(x, f"{path}/{x.name}".lstrip("/")) for x in layer.layers]
        spec = layer.inputs[0]
        return keras.Sequential(
            [keras.Input(batch_shape=spec.shape, dtype=spec.dtype), *layers], name=layer.name
        )

    def _graph(self, graph: keras.Model, path: str) -> tuple[Nested, Nested, Captured]:
        """Returns new inputs, the outputs of the old calls on them, and what was captured."""
        inputs = inputs_like(graph)
        pairs = zip(graph.inputs, tree.flatten(inputs), strict=True)
        tensors = {id(old): new for old, new in pairs}
        captured: Captured = []
        for old_call in calls(graph):
            name = old_call.operation.name
            arguments = old_call.with_tensors(tensors)
            flat = self._call_again(old_call, f"{path}/{name}" if path else name, arguments)
            outputs = flat[: len(old_call.outputs)]
            inside = iter(flat[len(old_call.outputs) :])
            pairs = zip(old_call.outputs, outputs, strict=True)
            tensors |= {id(old): new for old, new in pairs}
            for inner_path, value in self._captured.get(id(old_call.operation), ()):
                captured.append((inner_path, _with_tensors(value, inside)))
            if id(old_call.operation) in self._capture_at:
                value = self._capture(old_call.operation, arguments, outputs)
                captured.append((self._capture_at[id(old_call.operation)], value))
        outputs = tree.map_structure(lambda x: tensors[id(x)], graph.output)
        return inputs, outputs, captured

    def _capture(
        self, operation: keras.Operation, arguments: Arguments, outputs: list[Tensor]
    ) -> Nested:
        if self._of_inputs:
            args, kwargs = arguments
            values = [*args, *(x for x in kwargs.values() if isinstance(x, keras.KerasTensor))]
            return values[0] if len(values) == 1 else values
        if isinstance(operation, CompositeLayer):
            return operation.pack_outputs(outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _call_again(self, old_call: Call, path: str, arguments: Arguments) -> list[Tensor]:
        """Returns the flat outputs of a call in the new graph, and then what it captured."""
        args, kwargs = arguments
        operation = old_call.operation
        place = self._place(operation, path)
        asked = self._asked.get(id(operation)) if self._call is not None else None
        is_same = id(operation) not in self._replaced and _is_same(old_call, arguments)
        if asked is None and is_same:
            rebuilt = inner_layers(place) is not None  # its outputs may be others
            specs = inner_graph(place).outputs if rebuilt else old_call.outputs
            flat = record_call(place, args, kwargs, specs)
            self._changes.compare(old_call, path, arguments, flat, place, is_new=False)
            return flat
        takes_mask = "mask" in inspect.signature(place.call).parameters
        if "mask" in kwargs and (kwargs["mask"] is None or not takes_mask):
            del kwargs["mask"]  # Keras notes the mask as an argument, though nobody gave it
        try:
            with self._scopes(path):
                if asked is None or self._call is None:
                    outputs = place(*args, **kwargs)
                else:
                    outputs = self._call(place, asked, *args, **kwargs)
        except Exception as error:
            note_path(error, path)
            self._changes.explain(arguments, path, error)
            raise
        is_new = asked is not None or id(operation) in self._replaced
        read = getattr(operation, "read_replacement", None)
        if (
            is_new
            and read is not None
            and (asked is not None or type(place) is not type(operation))
        ):
            outputs = read(outputs)
        flat = tree.flatten(outputs)
        is_symbolic = all(isinstance(x, keras.KerasTensor) for x in flat)
        captured = _captured_tensors(self._captured.get(id(operation), []))
        if len(flat) != len(old_call.outputs) + len(captured) or not is_symbolic:
            raise ValueError(
                f"What stands at '{path}' now returned {outputs!r}. Expected "
                f"{len(old_call.outputs)} symbolic tensors in the order of the original layer's "
                f"outputs, of the shapes {[x.shape for x in old_call.outputs]}."
            )
        self._changes.compare(old_call, path, (args, kwargs), flat, place, is_new)
        return flat

    def _like(self, model: keras.Model, inputs: Nested, outputs: Nested) -> keras.Model:
        """Returns a model of the same class and attributes; its constructor does not run."""
        new = make_functional(type(model), inputs, outputs, model.name)
        own = own_attributes(model, names_on_every_model() | {FROZEN})
        moved = map_parts(lambda _, part: self._places.get(id(part), part), own)
        for key, value in moved.items():
            setattr(new, key, value)
        return new


def _captured_tensors(captured: Captured) -> list[keras.KerasTensor]:
    return [x for x in tree.flatten([value for _, value in captured]) if _is_symbolic(x)]


def _with_tensors(value: Nested, tensors: Iterator[Tensor]) -> Nested:
    return tree.map_structure(lambda x: next(tensors) if _is_symbolic(x) else x, value)


def _is_symbolic(x: Tensor) -> bool:
    return isinstance(x, keras.KerasTensor)


def _by_path(captured: Captured) -> dict[str, Nested]:
    values: dict[str, Nested] = {}
    for path, value in captured:
        calls_before = sum(key.partition("#")[0] == path for key in values)
        values[f"{path}#{calls_before + 1}" if calls_before else path] = value
    return values


def _is_same(old_call: Call, arguments: Arguments) -> bool:
    """Whether new arguments have the shapes and dtypes of the old ones, and there are no masks."""
    new = [x for x in tree.flatten(arguments) if _is_symbolic(x)]
    if any(mask_of(x) is not None for x in (*old_call.inputs, *new, *old_call.outputs)):
        return False
    pairs = zip(old_call.inputs, new, strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)


@contextmanager
def name_scopes(path: str) -> Iterator[None]:
    """Inside, what is built has a path that begins with this one."""
    with ExitStack() as stack:
        for name in path.split("/") if path else ():
            stack.enter_context(keras.name_scope(name))
        yield
