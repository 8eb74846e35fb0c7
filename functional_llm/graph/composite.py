"""CompositeLayer: a layer whose body is a functional graph of layers.

A Functional model needs its inputs when it is made; a layer may wait for its first call. A
CompositeLayer is a graph that waits: the body runs once, on symbolic inputs, when shapes are known.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

import keras
from keras import tree

from functional_llm.graph.signature import (
    Described,
    Structure,
    decode,
    describe,
    dotted,
    encode,
    layer_at,
    layer_paths,
    make_inputs,
    merge,
    specs_of,
    with_float_dtype,
)


@keras.saving.register_keras_serializable(package="functional_llm")
class CompositeLayer(keras.layers.Layer):
    """A layer made of a graph of layers, traced at its first call.

    The body is a function of (nested) symbolic inputs, a list of layers applied in order, a ready
    functional `keras.Model`, or the method `functional_build` of a subclass:

    ```python
    block = CompositeLayer([keras.layers.Dense(64, activation="relu"), keras.layers.Dense(32)])

    class Residual(CompositeLayer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def functional_build(self, inputs):
            return inputs + keras.layers.Dense(self.units)(inputs)
    ```

    Inputs and outputs are nested structures of tensors. An input may be `None` if it is optional:
    it comes from a `keras.Input(..., optional=True)`, or `layer.input_spec` was set before the
    first call and says `InputSpec(shape=..., optional=True)`, or it was `None` at the first call
    already (the body then receives `None`, and the input stays absent).

    Args:
        body: Callable, list of layers or functional `keras.Model`. Leave it out in a subclass that
            implements `functional_build`.
        **kwargs: Of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Raises:
        TypeError: If `body` is none of these.
    """

    input_spec: Any  # of keras.layers.Layer, which has no types

    def __init__(self, body: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.graph: keras.Model | None = None
        self._structure: Structure | None = None
        self._body = _as_body(body)
        self._rewired = False

    def functional_build(self, inputs: Any) -> Any:
        """Builds the graph: symbolic inputs in, symbolic outputs out. Subclasses override it.

        Args:
            inputs: Nested structure of `KerasTensor`s, `None` where an input is absent.

        Returns:
            Nested structure of `KerasTensor`s.
        """
        if self._body is None:
            raise NotImplementedError(
                f"{type(self).__name__} '{self.name}' has no body. Expected a function, a list of "
                "layers or a functional model as first argument, or a subclass that implements "
                "`functional_build(self, inputs)`."
            )
        return self._body(inputs)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if self._structure is None:
            self.build(Described(tree.map_structure(describe, inputs)))
        return super().__call__(self._built()[1].match(inputs, self.name), **kwargs)

    def build(self, input_shape: Any) -> None:
        """Traces the body into `self.graph`.

        Args:
            input_shape: Nested structure of shapes, `keras.InputSpec`s, tensors, or `None`.
        """
        if self.graph is not None:
            return
        if isinstance(self._body, _Ready):
            graph, structure, attributes = self._body.restore()
            for key, value in attributes.items():
                setattr(self, key, value)
            self.graph, self._structure = graph, structure
            self._body = _Ready(_never)  # lets go of what the graph was made from
        else:
            self.graph, self._structure = self._trace(input_shape)
        if not self.trainable and not self._rewired:
            self.graph.trainable = False  # Keras tells only the layers that are there already

    def _trace(self, input_shape: Any) -> tuple[keras.Model, Structure]:
        specs = merge(specs_of(input_shape, self.compute_dtype), self.input_spec, self.name)
        if self.input_spec is not None:
            anything = keras.InputSpec(optional=True)  # Keras stumbles over None in a dict
            self.input_spec = tree.map_structure(lambda s: s or anything, self.input_spec)
        if self.autocast and keras.backend.is_float_dtype(self.compute_dtype):
            specs = with_float_dtype(specs, self.compute_dtype)  # as Layer.__call__ casts them
        arguments = make_inputs(specs)
        present = [x for x in tree.flatten(arguments) if x is not None]
        if not present:
            raise ValueError(
                f"'{self.name}' is to be built without any input. Expected at least one tensor or "
                f"shape, received {specs!r}. Call the layer with a tensor first."
            )
        outputs = self.functional_build(arguments)
        for path, output in tree.flatten_with_path(outputs):
            if not isinstance(output, keras.KerasTensor):
                where = f" at '{dotted(path)}'" if path else ""
                raise ValueError(
                    f"The body of '{self.name}' returned {output!r}{where}. Expected symbolic "
                    "tensors made from its inputs; leave out what may be None."
                )
        try:
            graph = keras.Model(present, tree.flatten(outputs), name=self.name)
        except ValueError as error:
            raise ValueError(
                f"The body of '{self.name}' gave no graph from its inputs to its outputs: {error} "
                "Give the body all tensors it uses as inputs, and its layers different names."
            ) from error
        return graph, Structure(specs, tree.map_structure(lambda _: 0, outputs))

    def _built(self) -> tuple[keras.Model, Structure]:
        if self.graph is None or self._structure is None:
            raise ValueError(
                f"'{self.name}' has no graph yet. Expected a built layer: call it, or "
                "`build(shape)` it, first."
            )
        return self.graph, self._structure

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        graph, structure = self._built()
        flat, masks = structure.present(inputs), structure.masks(mask, self.name)
        if masks is not None:
            flat = [_unmarked(x, m) for x, m in zip(flat, masks, strict=True)]
        return structure.pack(graph.call(flat, training=training, mask=masks))

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        graph, structure = self._built()
        flat = structure.present(inputs)
        pairs = zip(flat, graph.inputs, strict=True)
        if all(x is not None and x.shape == known.shape for x, known in pairs):
            outputs = [keras.KerasTensor(x.shape, x.dtype, x.sparse) for x in graph.outputs]
            return structure.pack(outputs)
        # Another shape, or None. Functional.compute_output_spec crashes at None; tracing
        # abstractly, as Keras does for any layer, does not.
        return keras.Operation.compute_output_spec(self, inputs, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        self.build(input_shape)
        _, structure = self._built()
        shapes = structure.match(specs_of(input_shape, self.compute_dtype), self.name)

        def tensor(shape: Any, known: Any) -> keras.KerasTensor | None:
            return None if shape is None else keras.KerasTensor(shape.shape, known.dtype)

        tensors = tree.map_structure(tensor, shapes, structure.inputs)
        return tree.map_structure(lambda x: x.shape, self.compute_output_spec(tensors))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """The graph's own layers have put masks on the outputs, as if they stood outside."""
        return

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The layers of the graph, inputs included; empty before the first call."""
        return [] if self.graph is None else self.graph.layers

    def get_layer(self, name: str) -> keras.layers.Layer:
        """Returns the layer of the graph with this name.

        Raises:
            ValueError: If there is none, or the graph is not traced yet.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise ValueError(f"No layer '{name}' in '{self.name}'. It has: {names}.")

    def plot(self, to_file: str = "composite.png", **kwargs: Any) -> Any:
        """Draws the graph with everything inside it (`keras.utils.plot_model`).

        Raises:
            ImportError: If pydot or graphviz is missing.
            ValueError: If the graph is not traced yet.
        """
        graph, _ = self._built()
        return keras.utils.plot_model(expand(graph), to_file, expand_nested=True, **kwargs)

    def with_graph(self, graph: keras.Model, outputs: Any = None) -> Self:
        """Returns a layer of the same class with the same attributes, and another graph.

        Neither the constructor nor `functional_build` of the class runs. An attribute that is a
        layer of the present graph becomes the layer at the same place in the new one, or `None` if
        nothing is there: else it would keep, save and train weights that no longer take part.

        Args:
            graph: Functional model with as many inputs and outputs as the present graph.
            outputs: The structure of the outputs, if it is another (the leaves can be anything).
        """
        present, structure = self._built()
        if outputs is not None:
            structure = Structure(structure.inputs, tree.map_structure(lambda _: 0, outputs))
        sizes = (len(graph.inputs), len(graph.outputs))
        expected = (len(present.inputs), len(tree.flatten(structure.outputs)))
        if sizes != expected:
            raise ValueError(
                f"The graph of '{self.name}' has {expected[0]} inputs and {expected[1]} outputs. "
                f"Received a graph with {sizes[0]} and {sizes[1]}: keep those, they are what the "
                "layer is called with."
            )
        if not isinstance(graph.input, list) or any(map(tree.is_nested, graph.input)):
            graph = keras.Model(graph.inputs, graph.outputs, name=graph.name)
        old, new = layer_paths(self.layers), layer_paths(graph.layers)

        def replace(path: Any, layer: keras.layers.Layer) -> Any:
            kept = id(layer) in new or id(layer) not in old
            return layer if kept else layer_at(graph.layers, old[id(layer)])

        attributes = map_layers(replace, self._attributes())
        return self._copy(lambda: (graph, structure, attributes))

    def unpack_inputs(self, inputs: Any) -> list[Any]:
        """Returns what the flat inputs of the graph are, in a call with these nested inputs."""
        _, structure = self._built()
        return structure.present(structure.match(inputs, self.name))

    def pack_outputs(self, outputs: Any) -> Any:
        """Returns the flat outputs of the graph in the structure that the layer returns."""
        return self._built()[1].pack(outputs)

    def _attributes(self) -> dict[str, Any]:
        """What a subclass or a user has set on this object."""
        set_on_self = {**vars(self), **vars(self).get("_modules", {})}  # torch keeps layers there
        return {key: x for key, x in set_on_self.items() if key not in _names_of_every_layer()}

    def _copy(self, restore: "Restore | None") -> Self:
        """A layer of this class and name without the constructor; built if there is a graph."""
        new = type(self).__new__(type(self))
        CompositeLayer.__init__(
            new,
            name=self.name,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            autocast=self.autocast,
            activity_regularizer=self.activity_regularizer,
        )
        new.input_spec = self.input_spec
        new._auto_config = self._auto_config
        if restore is not None:
            new._body, new._rewired = _Ready(restore), True
            new.build(None)  # inside `build`, Keras names variables by path
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if isinstance(self._body, _Ready):
            self.build(None)
        if self.graph is None:
            new = self._copy(None)
            for key, value in self._copy_attributes(memo).items():
                setattr(new, key, value)
            new._body = self._body
            if isinstance(self._body, _Chain):
                new._body = _Chain([_copy_layer(layer, memo) for layer in self._body.layers])
            elif getattr(self._body, "__self__", None) is self:  # a method given as the body
                new._body = getattr(new, self._body.__name__)
        else:
            graph, structure = self._built()
            new = self._copy(
                lambda: (_copy_graph(graph, memo), structure, self._copy_attributes(memo))
            )
            new._rewired = self._rewired
        memo[id(self)] = new
        return new

    def _copy_attributes(self, memo: dict[int, Any]) -> dict[str, Any]:
        attributes = self._attributes()
        map_layers(lambda _, layer: _copy_layer(layer, memo), attributes)
        # Plain containers: Keras's tracking ones would take their layer along.
        return copy.deepcopy(map_layers(lambda _, layer: layer, attributes), memo)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, and the graph where no constructor can make it."""
        # Keras fills in the arguments of a plain constructor only where nobody overrides this.
        automatic = {} if self._auto_config is None else dict(self._auto_config.config)
        config = {**automatic, **super().get_config()}
        config.pop("body", None)
        body = self._body_config()
        self._check_arguments_known(has_body="layers" in body or "graph" in body)
        return {**config, "body": body} if body else config

    def _body_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {}
        if self.input_spec is not None:
            config["input_spec"] = encode(self.input_spec)
        if not self.autocast:
            config["autocast"] = False
        if isinstance(self._body, _Chain) and self.graph is None:
            config["layers"] = [keras.saving.serialize_keras_object(x) for x in self._body.layers]
        elif self._rewired or type(self).functional_build is CompositeLayer.functional_build:
            config.update(self._graph_config())
        return config

    def _graph_config(self) -> dict[str, Any]:
        if isinstance(self._body, _Ready):
            self.build(None)
        if self.graph is None:
            raise ValueError(
                f"'{self.name}' is made of a Python function and has not been called yet: there is "
                "no graph to serialize. Call it once, or write a subclass with `functional_build`."
            )
        paths = layer_paths(self.layers)
        attributes: dict[str, tuple[str, ...] | None] = {}
        map_layers(lambda at, x: attributes.update({at: paths.get(id(x))}), self._attributes())
        return {
            "graph": keras.saving.serialize_keras_object(self.graph),
            "structure": self._built()[1].get_config(),
            "attributes": attributes,
        }

    def _check_arguments_known(self, has_body: bool) -> None:
        """An argument that Keras could not record must not silently fall back to its default."""
        if self._auto_config is not None or type(self).get_config is not CompositeLayer.get_config:
            return
        names = list(_own_arguments(type(self)))
        if len(names) > has_body:  # one of them is the body
            raise NotImplementedError(
                f"Keras cannot record the arguments {names} of {type(self).__name__} by itself, "
                "for not all of them were numbers, strings or the like. Expected a `get_config` "
                "that adds to `super().get_config()` what the constructor needs besides the body."
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        body = config.pop("body", None) or {}
        layers = [keras.saving.deserialize_keras_object(x) for x in body.get("layers", ())]
        given: Any = _Chain(layers) if layers else _Ready(_never) if "graph" in body else None
        name = None if given is None else _body_argument(cls, config)
        new = super().from_config(config if name is None else {**config, name: given})
        if "input_spec" in body:
            new.input_spec = decode(body["input_spec"])
        new.autocast = body.get("autocast", new.autocast)
        return new._copy(lambda: new._restore(body)) if "graph" in body else new

    def _restore(self, config: dict[str, Any]) -> "Restored":
        """The stored graph; what the constructor made was only there to give the attributes."""
        graph = keras.saving.deserialize_keras_object(config["graph"])
        places = config["attributes"]

        def replace(at: str, layer: keras.layers.Layer) -> Any:
            path = places.get(at)
            if path is None:  # it has no place in the graph, or was lost when that was rewired
                return layer if at in places else None
            return layer_at(graph.layers, path)

        structure = Structure.from_config(config["structure"])
        return graph, structure, map_layers(replace, self._attributes())

    def get_build_config(self) -> dict[str, Any] | None:
        return None if self._structure is None else self._structure.get_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        self.build(Described(Structure.from_config(config).inputs))


Restored = tuple[keras.Model, Structure, dict[str, Any]]
Restore = Callable[[], Restored]


class _Chain:
    """A body that applies layers in order. Not a list attribute: Keras would track it twice."""

    def __init__(self, layers: list[Callable[[Any], Any]]) -> None:
        self.layers = layers

    def __call__(self, inputs: Any) -> Any:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


class _Ready:
    """A body that exists already: a model, a stored graph, or another layer's rewired graph."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore

    def __call__(self, inputs: Any) -> Any:  # constructors may ask for a callable
        raise RuntimeError("The graph exists already: expected no call of the body.")


def _never() -> Restored:
    raise RuntimeError("Stands in for a body while a constructor runs: expected no use of it.")


def _as_body(body: Any) -> Any:
    if body is None or isinstance(body, (_Chain, _Ready)):
        return body
    if isinstance(body, (list, tuple)) and body and all(callable(x) for x in body):
        return _Chain(list(body))
    if isinstance(body, keras.Model) and body.built and hasattr(body, "inputs"):
        return _Ready(lambda: _from_model(body))
    if callable(body) and not isinstance(body, keras.layers.Layer):
        return body
    raise TypeError(
        "CompositeLayer expects a function, a non-empty list of layers or a functional model. "
        f"Received: {body!r} of type {type(body).__name__}. A single layer goes into a list."
    )


def _own_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a constructor that are not those of every layer."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    of_all = ("name", "dtype", "trainable", "autocast", "activity_regularizer")
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.kind not in star and p.name not in of_all}


def _body_argument(cls: type, config: dict[str, Any]) -> str | None:
    """The constructor's argument for the body; `None` if it makes a body of its own."""
    arguments = _own_arguments(cls)
    signature = str(inspect.signature(cls.__init__))  # type: ignore[misc]
    if "body" in arguments or (not arguments and "*" in signature.replace("**", "")):
        return "body"
    missing = (p.name for p in arguments.values() if p.default is p.empty and p.name not in config)
    return next(missing, None)


@functools.cache
def _names_of_every_layer() -> frozenset[str]:
    return frozenset([*vars(CompositeLayer(name="any")), "_torch_params"])


def map_layers(fn: Callable[[str, Any], Any], value: Any, at: str = "") -> Any:
    """Replaces the layers in (plain, nested) attributes by `fn("name.index", layer)`."""
    if isinstance(value, keras.layers.Layer):
        return fn(at[1:], value)
    if isinstance(value, dict):
        return {key: map_layers(fn, x, f"{at}.{key}") for key, x in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        values = [map_layers(fn, x, f"{at}.{i}") for i, x in enumerate(value)]
        return tuple(values) if isinstance(value, tuple) else values
    return value


def _unmarked(x: Any, mask: Any) -> Any:
    """Functional.call marks its inputs with the masks: not the arrays of whoever calls."""
    if x is None or mask is None or getattr(x, "_keras_mask", None) is mask:
        return x
    return keras.ops.copy(x)


def _from_model(model: keras.Model) -> Restored:
    """The same graph with flat inputs and outputs, and the structure they had."""
    inputs, outputs = model.inputs, model.outputs
    if isinstance(model, keras.Sequential):  # its `input` is what it was called with elsewhere
        structure = Structure(describe(inputs[0]), 0)
    else:
        specs = tree.map_structure(describe, model.input)
        structure = Structure(specs, tree.map_structure(lambda _: 0, model.output))
    return keras.Model(inputs, outputs, name=model.name), structure, {}


def clone_graph(
    graph: keras.Model,
    clone_function: Callable[[keras.layers.Layer], keras.layers.Layer],
    call_function: Callable[..., Any] | None = None,
) -> keras.Model:
    """`keras.models.clone_model`, with optional inputs kept optional.

    Args:
        graph: Functional model.
        clone_function: Layer -> the layer to put in its place.
        call_function: `(layer, *args, **kwargs)` -> outputs of the call. Defaults to the call.
    """

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        # Keras notes the mask as an argument of the call, though nobody gave it: who comes in the
        # layer's place may not take one. The tensors carry it anyway.
        if "mask" in kwargs and "mask" not in inspect.signature(layer.call).parameters:
            del kwargs["mask"]
        return (call_function or _call)(layer, *args, **kwargs)

    specs = tree.map_structure(describe, graph.input)
    return keras.models.clone_model(
        graph,
        input_tensors=make_inputs(specs, [x.name for x in tree.flatten(graph.input)]),
        clone_function=clone_function,
        call_function=call,
    )


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def _copy_layer(layer: Any, memo: dict[int, Any]) -> Any:
    """By config, so that classes need not be registered; a graph's layers get weights later."""
    if id(layer) not in memo:
        if isinstance(layer, CompositeLayer):
            memo[id(layer)] = copy.deepcopy(layer, memo)
        elif isinstance(layer, keras.Sequential):
            memo[id(layer)] = keras.models.clone_model(
                layer, clone_function=lambda inner: _copy_layer(inner, memo)
            )
        elif isinstance(layer, keras.Model) and hasattr(layer, "inputs"):
            memo[id(layer)] = _copy_graph(layer, memo)
        else:
            memo[id(layer)] = type(layer).from_config(layer.get_config())
    return memo[id(layer)]


def _copy_graph(graph: keras.Model, memo: dict[int, Any]) -> keras.Model:
    """A copy with weights of its own."""
    new_graph = clone_graph(graph, lambda layer: _copy_layer(layer, memo))
    for layer in graph.layers:
        if id(layer) in memo and not isinstance(layer, CompositeLayer):  # they have theirs already
            pairs = zip(layer.variables, memo[id(layer)].variables, strict=True)
            for variable, new_variable in pairs:
                # A copy: training one model donates its arrays, which would delete the other's.
                new_variable.assign(keras.ops.copy(variable))
    return new_graph


def expand(model: keras.Model) -> keras.Model:
    """Returns the model with every CompositeLayer opened into the Functional model inside it.

    For looking only (`plot_model`, `summary`): layers are shared, not copied.
    """
    closed: dict[int, CompositeLayer] = {}

    def open_up(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, CompositeLayer):
            inside = expand(layer.graph)
            closed[id(inside)] = layer
            return inside
        is_graph = isinstance(layer, keras.Model) and hasattr(layer, "inputs")
        return expand(layer) if is_graph else layer

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        composite = closed.get(id(layer))
        if composite is None:
            return layer(*args, **kwargs)
        present = composite.unpack_inputs(args[0] if args else kwargs["inputs"])
        if any(x is None for x in present):
            return composite(*args, **kwargs)  # stock Functionals cannot be called with None
        return composite.pack_outputs(layer(present))

    if isinstance(model, keras.Sequential):  # whose layers Keras clones one by one
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return clone_graph(model, open_up, call)
