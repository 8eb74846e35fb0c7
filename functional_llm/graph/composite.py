"""CompositeLayer: a layer whose body is a functional graph of layers.

A Functional model needs its inputs when it is made; a layer may wait for its first call. A
CompositeLayer is a graph that waits: the body runs once, on symbolic inputs, when shapes are known.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import keras
from keras import tree

from functional_llm.graph.bodies import (
    Body,
    BuiltGraph,
    ExistingGraph,
    LayerSequence,
    as_body,
    trace,
)
from functional_llm.graph.composite_copying import Memo, copy_attributes, copy_body, copy_graph
from functional_llm.graph.composite_saving import (
    body_argument,
    check_arguments_recorded,
    graph_config,
    layers_config,
    options_config,
    restore_graph,
    restore_options,
)
from functional_llm.graph.input_specs import (
    InputSpecs,
    input_spec_of,
    specs_of,
    with_declared,
    with_float_dtype,
)
from functional_llm.graph.keras_private import (
    copy_recorded_arguments,
    mask_of,
    names_on_layer,
    own_attributes,
    recorded_arguments,
)
from functional_llm.graph.layer_paths import moved_layers
from functional_llm.graph.signature import Signature
from functional_llm.graph.types import JSON, Layer, Nested, Tensor


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

    input_spec: Nested  # of keras.layers.Layer, which has no types

    def __init__(
        self, body: Body | Sequence[Body] | keras.Model | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.graph: keras.Model | None = None
        self._signature: Signature | None = None
        self._body = as_body(body)
        self._rewired = False

    def functional_build(self, inputs: Nested) -> Nested:
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

    # Building and calling.

    def __call__(self, inputs: Nested, **kwargs: Any) -> Nested:
        if self._signature is None:
            self.build(InputSpecs(tree.map_structure(input_spec_of, inputs)))
        return super().__call__(self._built()[1].match(inputs, self.name), **kwargs)

    def build(self, input_shape: Nested) -> None:
        """Traces the body into `self.graph`.

        Args:
            input_shape: Nested structure of shapes, `keras.InputSpec`s, tensors, or `None`.
        """
        if self.graph is not None:
            return
        if isinstance(self._body, ExistingGraph):
            graph, signature, attributes = self._body.take()
            for key, value in attributes.items():
                setattr(self, key, value)
            self.graph, self._signature = graph, signature
        else:
            self.graph, self._signature = self._trace(input_shape)
        if not self.trainable and not self._rewired:
            self.graph.trainable = False  # Keras tells only the layers that are there already

    def _trace(self, input_shape: Nested) -> tuple[keras.Model, Signature]:
        specs = specs_of(input_shape, self.compute_dtype)
        specs = with_declared(specs, self.input_spec, self.name)
        if self.input_spec is not None:
            anything = keras.InputSpec(optional=True)  # Keras fails at None in a dict
            self.input_spec = tree.map_structure(lambda s: s or anything, self.input_spec)
        if self.autocast and keras.backend.is_float_dtype(self.compute_dtype):
            specs = with_float_dtype(specs, self.compute_dtype)  # as Layer.__call__ casts them
        return trace(self.functional_build, specs, self.name)

    def _built(self) -> tuple[keras.Model, Signature]:
        if self.graph is None or self._signature is None:
            raise ValueError(
                f"'{self.name}' has no graph yet. Expected a built layer: call it, or "
                "`build(shape)` it, first."
            )
        return self.graph, self._signature

    def call(
        self, inputs: Nested, training: bool | None = None, mask: Nested | None = None
    ) -> Nested:
        graph, signature = self._built()
        flat = signature.flatten_inputs(inputs)
        masks = signature.flatten_masks(mask, self.name)
        if masks is not None:
            flat = [_with_room_for_mask(x, m) for x, m in zip(flat, masks, strict=True)]
        return signature.restore_outputs(graph.call(flat, training=training, mask=masks))

    def compute_output_spec(self, inputs: Nested, **kwargs: Any) -> Nested:
        graph, signature = self._built()
        flat = signature.flatten_inputs(inputs)
        pairs = zip(flat, graph.inputs, strict=True)
        if all(x is not None and x.shape == known.shape for x, known in pairs):
            outputs = [keras.KerasTensor(x.shape, x.dtype, x.sparse) for x in graph.outputs]
            return signature.restore_outputs(outputs)
        # Another shape, or None. Functional.compute_output_spec crashes at None; tracing
        # abstractly, as Keras does for any layer, does not.
        return keras.Operation.compute_output_spec(self, inputs, **kwargs)

    def compute_output_shape(self, input_shape: Nested) -> Nested:
        self.build(input_shape)
        _, signature = self._built()
        shapes = signature.match(specs_of(input_shape, self.compute_dtype), self.name)

        def tensor(
            shape: keras.InputSpec | None, known: keras.InputSpec
        ) -> keras.KerasTensor | None:
            return None if shape is None else keras.KerasTensor(shape.shape, known.dtype)

        tensors = tree.map_structure(tensor, shapes, signature.inputs)
        return tree.map_structure(lambda x: x.shape, self.compute_output_spec(tensors))

    def compute_mask(self, inputs: Nested, previous_mask: Nested) -> None:
        """Returns nothing: the graph's own layers have put masks on the outputs already."""
        return

    # The graph.

    @property
    def layers(self) -> list[Layer]:
        """The layers of the graph, inputs included; empty before the first call."""
        return [] if self.graph is None else self.graph.layers

    def get_layer(self, name: str) -> Layer:
        """Returns the layer of the graph with this name.

        Raises:
            ValueError: If there is none, or the graph is not traced yet.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise ValueError(f"No layer '{name}' in '{self.name}'. It has: {names}.")

    def unpack_inputs(self, inputs: Nested) -> list[Tensor | None]:
        """Returns what the flat inputs of the graph are, in a call with these nested inputs."""
        _, signature = self._built()
        return signature.flatten_inputs(signature.match(inputs, self.name))

    def pack_outputs(self, outputs: Nested) -> Nested:
        """Returns the flat outputs of the graph in the structure that the layer returns."""
        return self._built()[1].restore_outputs(outputs)

    def with_graph(self, graph: keras.Model, outputs: Nested | None = None) -> Self:
        """Returns a layer of the same class with the same attributes, and another graph.

        Neither the constructor nor `functional_build` of the class runs. An attribute that is a
        layer of the present graph becomes the layer at the same place in the new one, or `None` if
        there is none: else it would keep, save and train weights that no longer take part.

        Args:
            graph: Functional model with as many inputs and outputs as the present graph.
            outputs: The structure of the outputs, if it is another (the leaves can be anything).
        """
        present, signature = self._built()
        if outputs is not None:
            signature = Signature(signature.inputs, outputs)
        sizes = (len(graph.inputs), len(graph.outputs))
        expected = (len(present.inputs), len(tree.flatten(signature.outputs)))
        if sizes != expected:
            raise ValueError(
                f"The graph of '{self.name}' has {expected[0]} inputs and {expected[1]} outputs. "
                f"Received a graph with {sizes[0]} and {sizes[1]}: keep those, they are what the "
                "layer is called with."
            )
        if not isinstance(graph.input, list) or any(map(tree.is_nested, graph.input)):
            graph = keras.Model(graph.inputs, graph.outputs, name=graph.name)
        attributes = moved_layers(self._attributes(), self.layers, graph.layers)
        return self._without_constructor(lambda: BuiltGraph(graph, signature, attributes))

    def _without_constructor(self, make: Callable[[], BuiltGraph] | None) -> Self:
        """Returns a layer of this class and name, with no attributes of its own.

        Args:
            make: Returns the graph and the attributes; `None` leaves the layer unbuilt.
        """
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
        copy_recorded_arguments(self, new)
        if make is not None:
            new._body, new._rewired = ExistingGraph(make), True
            new.build(None)  # inside `build`, Keras names variables by path
        return new

    def _attributes(self) -> dict[str, Any]:
        """Returns what a subclass or a user has set on this object."""
        return own_attributes(self, _names_on_every_composite())

    # Copying and saving.

    def __deepcopy__(self, memo: Memo) -> Self:
        if isinstance(self._body, ExistingGraph):
            self.build(None)
        if self.graph is None:
            new = self._without_constructor(None)
            for key, value in copy_attributes(self._attributes(), memo).items():
                setattr(new, key, value)
            new._body = copy_body(self._body, self, new, memo)
        else:
            graph, signature = self._built()
            new = self._without_constructor(
                lambda: BuiltGraph(
                    copy_graph(graph, memo), signature, copy_attributes(self._attributes(), memo)
                )
            )
            new._rewired = self._rewired
        memo[id(self)] = new
        return new

    def get_config(self) -> JSON:
        """Returns the constructor's arguments, and the graph where no constructor can make it."""
        # Keras fills in the arguments of a plain constructor only where nobody overrides this.
        config = {**(recorded_arguments(self) or {}), **super().get_config()}
        config.pop("body", None)
        body = options_config(self.input_spec, self.autocast) | self._body_config()
        if type(self).get_config is CompositeLayer.get_config:
            check_arguments_recorded(self, has_body="layers" in body or "graph" in body)
        return {**config, "body": body} if body else config

    def _body_config(self) -> JSON:
        if isinstance(self._body, LayerSequence) and self.graph is None:
            return layers_config(self._body)
        if not self._rewired and type(self).functional_build is not CompositeLayer.functional_build:
            return {}
        if isinstance(self._body, ExistingGraph):
            self.build(None)
        if self.graph is None:
            raise ValueError(
                f"'{self.name}' is made of a Python function and has not been called yet: there is "
                "no graph to serialize. Call it once, or write a subclass with `functional_build`."
            )
        return graph_config(BuiltGraph(*self._built(), self._attributes()))

    @classmethod
    def from_config(cls, config: JSON) -> Self:
        config = dict(config)
        stored = config.pop("body", None) or {}
        new = super().from_config({**config, **body_argument(cls, config, stored)})
        restore_options(new, stored)
        if "graph" not in stored:
            return new
        # What the constructor made was only there to set the attributes.
        return new._without_constructor(lambda: restore_graph(stored, new._attributes()))

    def get_build_config(self) -> JSON | None:
        return None if self._signature is None else self._signature.get_config()

    def build_from_config(self, config: JSON) -> None:
        self.build(InputSpecs(Signature.from_config(config).inputs))


@cache
def _names_on_every_composite() -> frozenset[str]:
    return names_on_layer(CompositeLayer(name="any"))


def _with_room_for_mask(x: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Returns a tensor that Functional.call may put a mask on: a copy, if it has none yet."""
    if x is None or mask is None or mask_of(x) is mask:
        return x
    return keras.ops.copy(x)
