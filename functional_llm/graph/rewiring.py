"""Rewiring: a new graph with other layers in it, around the same weights.

Calling a layer again leaves a trace on it: Keras notes every symbolic call on the layer itself, for
good. So a rewired graph holds *twins*: the same class, attributes and `keras.Variable`s, but calls
of their own. The original is not touched, and a graph that nobody needs any more is freed.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from types import MappingProxyType, MethodType
from typing import Any

import keras
from keras import tree

from functional_llm.graph.composite import CompositeLayer, map_layers
from functional_llm.graph.freezing import keep_frozen
from functional_llm.graph.selection import Where, inner_layers, select, walk
from functional_llm.graph.signature import describe, make_inputs

Replace = Callable[[Any, str], Any]
Tap = tuple[str, Any]  # a path, and a nested structure of tensors


def rewire(
    model: Any,
    fn: Replace | None = None,
    *,
    call: Callable[..., Any] | None = None,
    where: Where | None = None,
    freeze: bool | None = None,
) -> Any:
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

    Raises:
        TypeError: If the model has no graph, or `fn` returns no layer.
        ValueError: If `where` matches nothing, `call` returns other outputs than the layer had, or
            `freeze` is asked of a model whose class cannot do that (see `Freezable`).
    """
    layers = dict(walk(model)) if where is None else select(model, where)
    rewiring = Rewiring(model, fn, call, asked=layers)
    new_model = rewiring.result()
    if isinstance(new_model, keras.Model):
        keep_frozen(model, new_model, freeze)
    return new_model


def shared_copy(layer: Any) -> Any:
    """Returns a layer with the same class, attributes and variables, and no calls noted on it.

    Args:
        layer: A built layer, or any `keras.Operation`.
    """
    cls: Any = type(layer)
    new = cls.__new__(cls)
    for key, value in vars(layer).items():
        if key in _OWN:
            make = _OWN[key]
            value = vars(new)[key] if make is None else make()
        elif isinstance(value, MethodType) and value.__self__ is layer:
            value = MethodType(value.__func__, new)
        vars(new)[key] = value  # not setattr: the tracker of variables is shared, and complete
    return new


# All of Keras's private state that a twin must not share; `None` is what `__new__` has made. Beside
# these, this file needs `Functional._nodes_by_depth`, `Node.arguments`, `Tensor._keras_mask`.
_OWN: dict[str, Callable[[], Any] | None] = {
    "_inbound_nodes": list,
    "_outbound_nodes": list,
    "_losses": list,
    "_loss_ids": set,
    "_losses_override": list,
    "build": None,
    "quantize": None,
}


class Rewiring:
    """One run over a model: what `rewire` and `capture` have in common.

    Everything is keyed by the identity of the original's objects.

    Args:
        model: The original.
        fn: As for `rewire`.
        call: As for `rewire`.
        asked: Path -> layer: which layers `fn` and `call` are asked about.
        tapped: Path -> layer: which layers' outputs become outputs of the model.
        taps_inputs: Whether to take their inputs instead.
    """

    def __init__(
        self,
        model: Any,
        fn: Replace | None = None,
        call: Callable[..., Any] | None = None,
        asked: Mapping[str, Any] = MappingProxyType({}),
        tapped: Mapping[str, Any] = MappingProxyType({}),
        taps_inputs: bool = False,
    ) -> None:
        self._model = model
        self._fn = fn
        self._call = call
        self._layers = asked
        self._asked = {id(layer): path for path, layer in asked.items()}
        self._tapped = {id(layer): path for path, layer in tapped.items()}
        self._taps_inputs = taps_inputs
        self._taps: dict[int, list[Tap]] = {}
        self._known = {id(layer) for _, layer in walk(model, composites=True)}
        self._places: dict[int, Any] = {}
        self._replaced: dict[int, Any] = {}

    def result(self) -> Any:
        """Returns the new model."""
        replaced: list[str] = []
        for path, layer in self._layers.items() if self._fn is not None else ():
            if not any(path.startswith(f"{above}/") for above in replaced):
                new = self._ask(layer, path)
                if new is not layer:
                    self._replaced[id(layer)] = new
                    replaced.append(path)
        return self._container(self._model, "")

    def _ask(self, layer: Any, path: str) -> Any:
        with name_scopes(path.rpartition("/")[0]):
            new = self._fn(layer, path) if self._fn is not None else layer
        if not isinstance(new, keras.layers.Layer):
            raise TypeError(
                f"`fn` returned {new!r} for '{path}'. Expected a layer; return the layer itself "
                "to leave it as it is."
            )
        return new

    def _place(self, operation: Any, path: str) -> Any:
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

    def _container(self, layer: Any, path: str) -> Any:
        """Returns a layer or model like this one, around a new graph."""
        is_sequential = isinstance(layer, keras.Sequential)
        if is_sequential and self._call is None and not self._tapped:
            return self._sequential(layer, path)
        graph = layer.graph if isinstance(layer, CompositeLayer) else layer
        if is_sequential:  # it has no place for calls of another kind: a stock Functional
            graph = keras.Model(layer.inputs, layer.outputs, name=layer.name)
        inputs, outputs, taps = self._graph(graph, path)
        self._taps[id(layer)] = taps
        tapped = [x for _, value in taps for x in _tensors(value)]
        if isinstance(layer, CompositeLayer):
            outputs = tree.flatten(outputs)
            structure = (layer.pack_outputs(outputs), tapped) if tapped else None
            with name_scopes(path.rpartition("/")[0]):
                graph = keras.Model(inputs, [*outputs, *tapped], name=layer.name)
                return layer.with_graph(graph, structure)
        if layer is self._model and taps:
            named = outputs if isinstance(outputs, dict) else {"outputs": outputs}
            outputs = {**named, "captured": _by_path(taps)}
        elif taps:
            outputs = (outputs, tapped)
        return self._like(graph, inputs, outputs)

    def _sequential(self, layer: Any, path: str) -> Any:
        layers = [self._place(x, f"{path}/{x.name}".lstrip("/")) for x in layer.layers]
        spec = layer.inputs[0]
        return keras.Sequential(
            [keras.Input(batch_shape=spec.shape, dtype=spec.dtype), *layers], name=layer.name
        )

    def _graph(self, graph: Any, path: str) -> tuple[Any, Any, list[Tap]]:
        """Returns new inputs, the outputs of the old graph's calls on them, and what was tapped."""
        specs = tree.map_structure(describe, graph.input)
        inputs = make_inputs(specs, [x.name for x in tree.flatten(graph.input)])
        pairs = zip(graph.inputs, tree.flatten(inputs), strict=True)
        tensors = {id(old): new for old, new in pairs}
        taps: list[Tap] = []
        for node in calls(graph):
            args, kwargs = node.arguments.fill_in(tensors)
            inner_path = f"{path}/{node.operation.name}" if path else node.operation.name
            flat = self._node(node, inner_path, args, kwargs)
            outputs, tapped = flat[: len(node.outputs)], iter(flat[len(node.outputs) :])
            tensors |= {id(old): new for old, new in zip(node.outputs, outputs, strict=True)}
            for inside, value in self._taps.get(id(node.operation), ()):
                taps.append((inside, _with_tensors(value, tapped)))
            if id(node.operation) in self._tapped:
                taps.append(self._tap(node.operation, args, kwargs, outputs))
        return inputs, tree.map_structure(lambda x: tensors[id(x)], graph.output), taps

    def _tap(self, operation: Any, args: Any, kwargs: Any, outputs: list[Any]) -> Tap:
        value: Any = outputs[0] if len(outputs) == 1 else outputs
        if isinstance(operation, CompositeLayer):
            value = operation.pack_outputs(outputs)
        if self._taps_inputs:
            values = [*args, *(x for x in kwargs.values() if isinstance(x, keras.KerasTensor))]
            value = values[0] if len(values) == 1 else values
        return self._tapped[id(operation)], value

    def _node(self, node: Any, path: str, args: Any, kwargs: Any) -> list[Any]:
        place = self._place(node.operation, path)
        asked = self._asked.get(id(node.operation)) if self._call is not None else None
        is_same = id(node.operation) not in self._replaced and _is_same(node, args, kwargs)
        if asked is None and is_same:
            inner = getattr(place, "graph", place)
            rebuilt = isinstance(inner, keras.Model)  # its outputs may be others
            return record(place, args, kwargs, inner.outputs if rebuilt else node.outputs)
        takes_mask = "mask" in inspect.signature(place.call).parameters
        if "mask" in kwargs and (kwargs["mask"] is None or not takes_mask):
            del kwargs["mask"]  # Keras notes the mask as an argument, though nobody gave it
        with name_scopes(path.rpartition("/")[0]):
            if asked is None or self._call is None:
                outputs = place(*args, **kwargs)
            else:
                outputs = self._call(place, asked, *args, **kwargs)
        flat = tree.flatten(outputs)
        is_symbolic = all(isinstance(x, keras.KerasTensor) for x in flat)
        tapped = [x for _, value in self._taps.get(id(node.operation), ()) for x in _tensors(value)]
        if len(flat) != len(node.outputs) + len(tapped) or not is_symbolic:
            raise ValueError(
                f"What stands at '{path}' now returned {outputs!r}. Expected "
                f"{len(node.outputs)} symbolic tensors in the order of the original layer's "
                f"outputs, of the shapes {[x.shape for x in node.outputs]}."
            )
        return flat

    def _like(self, model: Any, inputs: Any, outputs: Any) -> Any:
        """A model of the same class and attributes, without the class's constructor."""
        stock = keras.Model(inputs, outputs, name=model.name)
        if type(model) is type(stock):
            new = stock
        else:
            cls: Any = type(model)
            new = cls.__new__(cls)
            type(stock).__init__(new, inputs, outputs, name=model.name)

        def replace(_: str, layer: Any) -> Any:
            return self._places.get(id(layer), layer)

        known = _names_of_every_model()
        own = {key: x for key, x in vars(model).items() if key not in known}
        for key, value in map_layers(replace, own).items():
            setattr(new, key, value)
        return new


def _tensors(value: Any) -> list[Any]:
    return [x for x in tree.flatten(value) if isinstance(x, keras.KerasTensor)]


def _with_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    return tree.map_structure(
        lambda x: next(tensors) if isinstance(x, keras.KerasTensor) else x, value
    )


def _by_path(taps: list[Tap]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in taps:
        calls_before = sum(key.partition("#")[0] == path for key in values)
        values[f"{path}#{calls_before + 1}" if calls_before else path] = value
    return values


def calls(graph: Any) -> Iterator[Any]:
    """Yields the calls (Keras's nodes) in a graph, in an order in which they can be run."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        yield from (node for node in graph._nodes_by_depth[depth] if not node.is_input)


def record(operation: Any, args: Any, kwargs: Any, outputs: Iterable[Any]) -> list[Any]:
    """Notes a call whose outputs are known, without tracing it: that is where building takes time.

    Args:
        operation: A twin, called with what has the shapes of the original's call.
        args: Positional arguments.
        kwargs: The others.
        outputs: The outputs of the original's call.
    """
    specs = [keras.KerasTensor(x.shape, x.dtype, x.sparse) for x in outputs]
    vars(operation)["compute_output_spec"] = lambda *args, **kwargs: specs
    try:
        return keras.Operation.symbolic_call(operation, *args, **kwargs)
    finally:
        del vars(operation)["compute_output_spec"]


def _is_same(node: Any, args: Any, kwargs: Any) -> bool:
    """Whether new arguments are like those of an old call; masks are for Keras to work out."""
    old = node.arguments.keras_tensors
    new = [x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
    if any(getattr(x, "_keras_mask", None) is not None for x in (*old, *new, *node.outputs)):
        return False
    pairs = zip(old, new, strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)


@contextmanager
def name_scopes(path: str) -> Iterator[None]:
    """Inside, what is built has a path that begins with this one."""
    with ExitStack() as stack:
        for name in path.split("/") if path else ():
            stack.enter_context(keras.name_scope(name))
        yield


@cache
def _names_of_every_model() -> frozenset[str]:
    """What Keras sets on a functional model, when it is compiled and fitted too."""
    x = keras.Input((1,))
    model = keras.Model(x, x)
    # Listed, not found by compiling a model: JAX would compile programs for an optimizer's numbers.
    of_compile = ["_compile_config", "_compiled_trainable_state", "optimizer", "stop_training"]
    of_fit = ["history", "_jax_state", "_eval_epoch_iterator", "_compiled_metrics"]
    of_fit += ["stop_evaluating", "stop_predicting", "_manual_input_spec", "_frozen"]
    return frozenset([*vars(model), *of_compile, *of_fit])
