"""CompositeLayer: a layer whose body is a functional graph of layers.

A Functional model needs its inputs when it is made; a layer may wait for its first call. A
CompositeLayer is a graph that waits: the body runs once, on symbolic inputs, when shapes are known.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import keras
from keras import tree

from functional_llm.graph.attributes import fingerprints
from functional_llm.graph.bodies import (
    Body,
    BuiltGraph,
    ExistingGraph,
    LayerSequence,
    as_body,
    check_takes_inputs,
    no_graph_yet,
    trace,
)
from functional_llm.graph.composite_copying import Memo, copy_layer
from functional_llm.graph.composite_saving import (
    check_arguments_recorded,
    graph_config,
    keep_body,
    layers_config,
    options_config,
    with_body,
    without_body,
)
from functional_llm.graph.input_specs import (
    InputSpecs,
    for_any_batch,
    input_spec_of,
    specs_of,
    with_declared,
    with_float_dtype,
)
from functional_llm.graph.keras_private import (
    copy_recorded_arguments,
    in_recursive_clone,
    mask_of,
    names_on_layer,
    own_attributes,
    own_metrics,
    recorded_arguments,
    set_untracked,
)
from functional_llm.graph.layer_errors import keep_note, note_layer
from functional_llm.graph.layer_paths import find_layer, moved_parts
from functional_llm.graph.own_weights import with_own_weights
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

    As in a Functional model, sizes are those of the first call, except the batch's and the length
    of an optional input: a body may count with them, so that another size is refused.
    `keras.Input((None, ...))` or an `input_spec` with `None` leaves a size open.

    A weight of the layer itself takes part where the body gives it to an operation together with
    something made from the inputs: `inputs * self.scale`, but not `1 + self.scale`, which is a
    number.

    Args:
        body: Callable, list of layers or functional `keras.Model`. Leave it out in a subclass that
            implements `functional_build`.
        **kwargs: Of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    Raises:
        TypeError: If `body` is none of these, or takes no inputs.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keep_body(cls)

    def __init__(
        self, body: Body | Sequence[Body] | keras.Model | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._signature: Signature | None = None
        self.supports_masking = True
        self.graph: keras.Model | None = None
        self._parts: list[Layer] = []  # of the graph; tracked in its place, and each once
        self._body = as_body(body)
        self._rewired = False
        self._made: frozenset[str] = frozenset()  # what `functional_build` has set
        if self._makes_graph():
            check_takes_inputs(self.functional_build)

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

    @classmethod
    def _makes_graph(cls) -> bool:
        return cls.functional_build is not CompositeLayer.functional_build

    # Building and calling.

    def __call__(self, inputs: Nested, **kwargs: Any) -> Nested:
        if self._signature is None:
            self.build(InputSpecs(tree.map_structure(input_spec_of, inputs)))
        try:
            return super().__call__(self._built()[1].match(inputs, self.name), **kwargs)
        except Exception as error:
            keep_note(error)
            raise

    def build(self, input_shape: Nested) -> None:
        """Traces the body into `self.graph`.

        Args:
            input_shape: Nested structure of shapes (for any batch size), `keras.InputSpec`s,
                tensors, or `None`.
        """
        if self.graph is not None:
            return
        try:
            if isinstance(self._body, ExistingGraph):
                graph, self._signature, attributes = self._body.take()
                for key, value in attributes.items():
                    setattr(self, key, value)
            else:
                graph, self._signature = self._trace(input_shape)
            graph = with_own_weights(graph, self.dtype_policy)
        except Exception as error:
            note_layer(error, self.name)
            raise
        set_untracked(self, "graph", graph)
        self._parts = [x for x in graph.layers if not isinstance(x, keras.layers.InputLayer)]
        self._body = None  # what it holds may be freed
        if not self.trainable and not self._rewired:  # type: ignore[has-type]
            self.trainable = False  # Keras tells only the layers that are there already

    def _trace(self, input_shape: Nested) -> tuple[keras.Model, Signature]:
        specs = specs_of(input_shape, self.compute_dtype)
        if not isinstance(input_shape, InputSpecs):
            specs = for_any_batch(specs)
        specs = with_declared(specs, self.input_spec, self.name)
        if self.input_spec is not None:
            anything = keras.InputSpec(optional=True)  # Keras fails at None in a dict
            self.input_spec = tree.map_structure(lambda s: s or anything, self.input_spec)
        if self.autocast and keras.backend.is_float_dtype(self.compute_dtype):
            specs = with_float_dtype(specs, self.compute_dtype)  # as Layer.__call__ casts them
        before = fingerprints(self._attributes())
        traced = trace(self.functional_build, specs, self.name)
        after = fingerprints(self._attributes())
        self._made = frozenset(key for key in after if before.get(key) != after[key])
        return traced

    def build_existing(self) -> None:
        """Builds the layer if its body is a ready graph, for which nothing need be known."""
        if isinstance(self._body, ExistingGraph):
            self.build(None)

    def _built(self) -> tuple[keras.Model, Signature]:
        self.build_existing()
        if self.graph is None or self._signature is None:
            raise no_graph_yet(self.name)
        return self.graph, self._signature

    def call(
        self, inputs: Nested, training: bool | None = None, mask: Nested | None = None
    ) -> Nested:
        graph, signature = self._built()
        flat = signature.flatten_inputs(inputs)
        masks = signature.flatten_masks(mask, self.name)
        if masks is not None:
            flat = [_with_room_for_mask(x, m) for x, m in zip(flat, masks, strict=True)]
        try:
            outputs = graph.call(flat, training=training, mask=masks)
        except Exception as error:
            note_layer(error, self.name)
            raise
        return signature.restore_outputs(outputs)

    def compute_output_spec(self, inputs: Nested, **kwargs: Any) -> Nested:
        if in_recursive_clone():
            raise NotImplementedError(
                f"`clone_model(..., recursive=True)` reaches into models, and not into "
                f"'{self.name}', a {type(self).__name__}. Expected `functional_llm.rewire(model, "
                "fn)` or `rewire(model, call=...)`, which reach into every graph."
            )
        graph, signature = self._built()
        inputs = signature.with_known_sizes(signature.match(inputs, self.name))
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
    def input_spec(self) -> Nested:
        """What was declared, in the structure of the inputs; else what the graph was built with."""
        declared = super().input_spec
        return self._signature.input_spec if declared is None and self._signature else declared

    @input_spec.setter
    def input_spec(self, value: Nested) -> None:
        keras.layers.Layer.input_spec.fset(self, value)

    @property
    def layers(self) -> list[Layer]:
        """The layers of the graph, inputs included; empty before the first call."""
        return [] if self.graph is None else self.graph.layers

    @property
    def metrics(self) -> list[keras.Metric]:
        """The metrics of this layer itself. A model asks each of the layers inside for theirs."""
        return own_metrics(self)

    def get_layer(self, name: str | None = None, index: int | None = None) -> Layer:
        """Returns the layer of the graph with this name, or at this place in `layers`.

        Raises:
            ValueError: If there is none, the graph is not traced yet, or not one of both is given.
        """
        return find_layer(self._built()[0].layers, name, index, self.name)

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
        attributes = moved_parts(self._attributes(), self.layers, graph.layers)
        new = self._without_constructor(lambda: BuiltGraph(graph, signature, attributes))
        new._made = self._made
        return new

    def _without_constructor(self, make: Callable[[], BuiltGraph]) -> Self:
        """Returns a layer of this class and name, with a graph and attributes made elsewhere."""
        # Keras calls the `build` of the class that is made; that of a subclass may make weights.
        new: Self = CompositeLayer.__new__(CompositeLayer)
        new.__class__ = type(self)
        CompositeLayer.__init__(
            new,
            name=self.name,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            autocast=self.autocast,
            activity_regularizer=self.activity_regularizer,
        )
        new.input_spec = super().input_spec
        copy_recorded_arguments(self, new)
        new._body, new._rewired = ExistingGraph(make), True
        new.build(None)  # inside `build`, Keras names variables by path
        return new

    def _attributes(self) -> dict[str, Any]:
        """Returns what a subclass or a user has set on this object."""
        return own_attributes(self, _names_on_every_composite())

    # Copying and saving.

    def __deepcopy__(self, memo: Memo) -> Self:
        self.build_existing()
        new: Self = copy_layer(self, memo)
        return new

    @with_body
    def get_config(self) -> JSON:
        """Returns the constructor's arguments, and the graph where no constructor can make it."""
        # Keras fills in the arguments of a plain constructor only where nobody overrides this.
        config = {**(recorded_arguments(self) or {}), **super().get_config()}
        config.pop("body", None)
        body = self._saved_body()
        if type(self).get_config is CompositeLayer.get_config:
            check_arguments_recorded(self, has_body="layers" in body or "graph" in body)
        return {**config, "body": body} if body else config

    def _saved_body(self) -> JSON:
        options = options_config(super().input_spec, self.autocast)
        if isinstance(self._body, LayerSequence):
            return options | layers_config(self._body)
        if not self._rewired and self._makes_graph():
            return options
        self.build_existing()
        if self.graph is None:
            raise ValueError(
                f"'{self.name}' is made of a Python function and has not been called yet: there is "
                "no graph to serialize. Call it once, or write a subclass with `functional_build`."
            )
        built = BuiltGraph(*self._built(), self._attributes())
        return options | graph_config(built, self._made)

    @classmethod
    @without_body
    def from_config(cls, config: JSON) -> Self:
        return super().from_config(config)

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
