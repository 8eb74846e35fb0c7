"""CompositeLayer: a layer whose body is a functional graph of layers.

A Functional model needs its inputs when it is made; a layer may wait for its first call. A
CompositeLayer is a graph that waits: the body runs once, on symbolic inputs, when shapes are known.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, Self

import keras
from keras import tree

from functional_llm.structure import Structure, describe, dotted, make_inputs, merge, specs_of


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
            self.build(tree.map_structure(self._describe, inputs))
        return super().__call__(self._structure.match(inputs, self.name), **kwargs)

    def _describe(self, x: Any) -> keras.InputSpec | None:
        spec = describe(x)
        if spec is not None and self.autocast and keras.backend.is_float_dtype(spec.dtype):
            spec.dtype = self.compute_dtype  # Layer.__call__ casts what it passes on
        return spec

    def build(self, input_shape: Any) -> None:
        """Traces the body into `self.graph`.

        Args:
            input_shape: Nested structure of shapes, `keras.InputSpec`s, tensors, or `None`.
        """
        if self.graph is not None:
            return
        if isinstance(self._body, _Ready):
            self.graph, self._structure = self._body.restore()
            return
        specs = merge(specs_of(input_shape, self.compute_dtype), self.input_spec, self.name)
        arguments = make_inputs(specs)
        outputs = self.functional_build(arguments)
        for path, output in tree.flatten_with_path(outputs):
            if not isinstance(output, keras.KerasTensor):
                raise ValueError(
                    f"The body of '{self.name}' returned {output!r} at '{dotted(path)}'. Expected "
                    "symbolic tensors made from its inputs; leave out what may be None."
                )
        present = [x for x in tree.flatten(arguments) if x is not None]
        self.graph = keras.Model(present, tree.flatten(outputs), name=self.name)
        self._structure = Structure(specs, tree.map_structure(lambda _: 0, outputs))

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        flat = self._structure.present(inputs)
        masks = None if mask is None else self._structure.present(mask)
        if masks is not None and all(m is None for m in masks):
            masks = None
        return self._structure.pack(self.graph.call(flat, training=training, mask=masks))

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        flat = self._structure.present(inputs)
        same = (x is not None and x.shape == g.shape for x, g in zip(flat, self.graph.inputs))
        if all(same):
            outputs = [keras.KerasTensor(x.shape, x.dtype) for x in self.graph.outputs]
            return self._structure.pack(outputs)
        # Another shape, or None. Functional.compute_output_spec crashes at None; tracing
        # abstractly, as Keras does for any layer, does not.
        return keras.Operation.compute_output_spec(self, inputs, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        specs = specs_of(input_shape, self.compute_dtype)
        tensors = tree.map_structure(lambda s: s and keras.KerasTensor(s.shape, s.dtype), specs)
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
        """Draws the graph with everything inside it (`keras.utils.plot_model`)."""
        if self.graph is None:
            raise ValueError(f"'{self.name}' has no graph yet: call it first, then plot it.")
        return keras.utils.plot_model(expand(self.graph), to_file, expand_nested=True, **kwargs)

    def with_graph(self, graph: keras.Model) -> Self:
        """Returns a layer of the same class with the same attributes, and another graph.

        Neither the constructor nor `functional_build` of the class runs.

        Args:
            graph: Functional model with as many inputs and outputs as the present graph.
        """
        return self._copy_around(graph, self._attributes())

    def _attributes(self) -> dict[str, Any]:
        """What a subclass or a user has set on this object."""
        own = vars(CompositeLayer(name=self.name))
        return {key: value for key, value in vars(self).items() if key not in own}

    def _copy_around(self, graph: keras.Model, attributes: dict[str, Any]) -> Self:
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
        for key, value in attributes.items():
            setattr(new, key, value)
        new._body, new._rewired = _Ready(lambda: (graph, self._structure)), True
        new.build(None)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.graph is None:
            new = type(self).from_config(self.get_config())
        else:
            graph = _copy_graph(self.graph, memo)
            new = self._copy_around(graph, copy.deepcopy(self._attributes(), memo))
            new._rewired = self._rewired
        memo[id(self)] = new
        return new

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, and the graph where no constructor can make it."""
        # Keras fills in the arguments of a plain constructor only where nobody overrides this.
        automatic = {} if self._auto_config is None else dict(self._auto_config.config)
        automatic.pop("body", None)
        config = {**automatic, **super().get_config()}
        made_by_class = type(self).functional_build is not CompositeLayer.functional_build
        if isinstance(self._body, _Chain) and self.graph is None:
            config["layers"] = [keras.saving.serialize_keras_object(x) for x in self._body.layers]
        elif self._rewired or not made_by_class:
            config["graph"] = self._graph_config()
        return config

    def _graph_config(self) -> dict[str, Any]:
        if self.graph is None:
            raise ValueError(
                f"'{self.name}' is made of a Python function and has not been called yet: there is "
                "no graph to serialize. Call it once, or write a subclass with `functional_build`."
            )
        model = keras.saving.serialize_keras_object(self.graph)
        return {"model": model, "structure": self._structure.get_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        graph, layers = config.pop("graph", None), config.pop("layers", None)
        if layers is not None:
            chain = [keras.saving.deserialize_keras_object(x) for x in layers]
            return cls(chain, **config) if _takes_body(cls, config) else super().from_config(config)
        if graph is None:
            return super().from_config(config)
        ready = _Ready(lambda: _restore(graph))
        new = cls(ready, **config) if _takes_body(cls, config) else super().from_config(config)
        new._body, new._rewired = ready, True
        new.build(None)  # inside `build`, Keras names the restored variables by path
        return new

    def get_build_config(self) -> dict[str, Any] | None:
        return None if self._structure is None else self._structure.get_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        self.build(Structure.from_config(config).inputs)


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

    def __init__(self, restore: Callable[[], tuple[keras.Model, Structure]]) -> None:
        self.restore = restore


def _as_body(body: Any) -> Any:
    if body is None or isinstance(body, _Ready):
        return body
    if isinstance(body, (list, tuple)) and body and all(callable(x) for x in body):
        return _Chain(list(body))
    if isinstance(body, keras.Model) and hasattr(body, "inputs") and body.built:
        return _Ready(lambda: _from_model(body))
    if callable(body) and not isinstance(body, keras.layers.Layer):
        return body
    raise TypeError(
        "CompositeLayer expects a function, a non-empty list of layers or a functional model. "
        f"Received: {body!r} of type {type(body).__name__}."
    )


def _takes_body(cls: type, config: dict[str, Any]) -> bool:
    """Whether the constructor's first argument is the body, or it makes a body of its own."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if not parameters or parameters[0].name in config:
        return False
    first = parameters[0]
    if first.kind is first.VAR_POSITIONAL or first.name == "body":
        return True
    return first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty


def _from_model(model: keras.Model) -> tuple[keras.Model, Structure]:
    """The same graph with flat inputs and outputs, and the structure they had."""
    specs = tree.map_structure(lambda x: describe(x, x.dtype), model.input)
    flat = keras.Model(tree.flatten(model.input), tree.flatten(model.output), name=model.name)
    return flat, Structure(specs, tree.map_structure(lambda _: 0, model.output))


def _restore(config: dict[str, Any]) -> tuple[keras.Model, Structure]:
    model = keras.saving.deserialize_keras_object(config["model"])
    return model, Structure.from_config(config["structure"])


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
    specs = tree.map_structure(lambda x: describe(x, x.dtype), graph.input)
    return keras.models.clone_model(
        graph,
        input_tensors=make_inputs(specs, names=tree.map_structure(lambda x: x.name, graph.input)),
        clone_function=clone_function,
        call_function=call_function,
    )


def _copy_graph(graph: keras.Model, memo: dict[int, Any]) -> keras.Model:
    """A copy with weights of its own. By config, so that classes need not be registered."""

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in memo:
            nested = isinstance(layer, CompositeLayer)
            new = copy.deepcopy(layer, memo) if nested else type(layer).from_config(layer.get_config())
            memo[id(layer)] = new
        return memo[id(layer)]

    new_graph = clone_graph(graph, copy_layer)
    for layer in graph.layers:
        if id(layer) in memo:
            for variable, new_variable in zip(layer.variables, memo[id(layer)].variables):
                new_variable.assign(variable)
    return new_graph


def expand(model: keras.Model) -> keras.Model:
    """Returns the model with every CompositeLayer opened into the Functional model inside it.

    For looking only (`plot_model`, `summary`): layers are shared, not copied.
    """
    opened: dict[int, Structure] = {}

    def open_up(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, CompositeLayer):
            return layer
        inside = expand(layer.graph)
        opened[id(inside)] = layer._structure
        return inside

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        structure = opened.get(id(layer))
        if structure is None:
            return layer(*args, **kwargs)
        return structure.pack(layer(structure.present(args[0])))

    return clone_graph(model, open_up, call)
