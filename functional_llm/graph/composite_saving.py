"""How a CompositeLayer is saved: what its config holds beside the constructor's arguments.

Under the key "body" a config may have "graph", "structure", "attributes" and "made" (a graph that
no constructor can make, and what is set on the layer), "layers" (a list of layers that is not built
yet), "input_spec" and "autocast".
"""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeAlias

import keras

from functional_llm.graph.attributes import attributes_config, restore_attributes
from functional_llm.graph.bodies import BuiltGraph, ExistingGraph, LayerSequence
from functional_llm.graph.keras_private import recorded_arguments
from functional_llm.graph.own_weights import check_no_ties
from functional_llm.graph.signature import Signature
from functional_llm.graph.structure_json import decode, encode
from functional_llm.graph.types import JSON, Layer, Nested

_GetConfig: TypeAlias = Callable[[Any], JSON]
_FromConfig: TypeAlias = Callable[[type, JSON], Any]


def options_config(input_spec: Nested, autocast: bool) -> JSON:
    """Returns those options of a composite that are not the default."""
    config: JSON = {}
    if input_spec is not None:
        config["input_spec"] = encode(input_spec)
    if not autocast:
        config["autocast"] = False
    return config


def restore_options(layer: Layer, stored: JSON) -> None:
    """Sets on a layer what `options_config` stored."""
    if "input_spec" in stored:
        layer.input_spec = decode(stored["input_spec"])
    layer.autocast = stored.get("autocast", layer.autocast)


def layers_config(body: LayerSequence) -> JSON:
    """Returns the config of a list of layers that is not built yet."""
    return {"layers": [keras.saving.serialize_keras_object(layer) for layer in body.layers]}


def graph_config(built: BuiltGraph, made: Iterable[str]) -> JSON:
    """Returns the config of a graph, and of what is set on the composite.

    Args:
        built: The graph; `attributes` are those set on the composite.
        made: The names of those that `functional_build` has set.

    Raises:
        NotImplementedError: At something that a file cannot hold.
    """
    graph = built.graph
    check_no_ties(graph)
    return {
        "graph": keras.saving.serialize_keras_object(graph),
        "structure": built.signature.get_config(),
        **attributes_config(built.attributes, made, graph.layers, graph.name),
    }


def restore_graph(config: JSON, attributes: dict[str, Any]) -> BuiltGraph:
    """Returns the graph that `graph_config` stored.

    Args:
        config: From `graph_config`.
        attributes: Those that the constructor has set.
    """
    graph = keras.saving.deserialize_keras_object(config["graph"])
    signature = Signature.from_config(config["structure"])
    return BuiltGraph(graph, signature, restore_attributes(config, attributes, graph.layers))


def body_argument(cls: type, config: JSON, stored: JSON) -> JSON:
    """Returns the argument that a constructor is given for the body, by its name, if any.

    Args:
        cls: Class of composites.
        config: The other arguments of the constructor.
        stored: What the layer's config has under "body".
    """
    arguments = _own_arguments(cls)
    signature = str(inspect.signature(cls.__init__))  # type: ignore[misc]
    name: str | None = "body"
    if "body" not in arguments and (arguments or "*" not in signature.replace("**", "")):
        required = (p.name for p in arguments.values() if p.default is p.empty)
        name = next((x for x in required if x not in config), None)
    if name is None:  # the constructor makes a body of its own
        return {}
    if stored.get("layers"):
        layers = [keras.saving.deserialize_keras_object(layer) for layer in stored["layers"]]
        return {name: LayerSequence(layers)}
    return {name: ExistingGraph(None)} if "graph" in stored else {}


def keep_body(cls: Any) -> None:
    """Makes a subclass's own `get_config` and `from_config` leave the body alone.

    They deal with the constructor's arguments, as in any layer of Keras's. One that drops what it
    does not know would drop the graph; one that calls `cls(**config)` would pass it on.
    """
    if not hasattr(cls.get_config, "keeps_body"):
        cls.get_config = with_body(cls.get_config)
    if not hasattr(cls.from_config, "keeps_body"):
        cls.from_config = classmethod(without_body(cls.from_config.__func__))


def with_body(get_config: _GetConfig) -> _GetConfig:
    """Returns a `get_config` that adds the body if it is not there."""

    @wraps(get_config)
    def complete(self: Any) -> JSON:
        config = get_config(self)
        if "body" in config:
            return config
        body = self._saved_body()
        return {**config, "body": body} if body else config

    complete.keeps_body = True  # type: ignore[attr-defined]
    return complete


def without_body(from_config: _FromConfig) -> _FromConfig:
    """Returns a `from_config` that is not given the body, which is put into what it has made."""

    @wraps(from_config)
    def complete(cls: type, config: JSON) -> Any:
        config = dict(config)
        stored = config.pop("body", None) or {}
        if not isinstance(stored, dict):  # a body given as an argument, by the next lines
            return from_config(cls, {**config, "body": stored})
        return restore_body(
            from_config(cls, {**config, **body_argument(cls, config, stored)}), stored
        )

    complete.keeps_body = True  # type: ignore[attr-defined]
    return complete


def restore_body(layer: Any, stored: JSON) -> Any:
    """Returns a layer like one that a constructor has made, with what `_saved_body` stored."""
    restore_options(layer, stored)
    if "graph" not in stored:
        return layer
    # What the constructor made was only there to set the attributes.
    new = layer._without_constructor(lambda: restore_graph(stored, layer._attributes()))
    new._made = frozenset(stored.get("made", ()))
    return new


def check_arguments_recorded(layer: Layer, has_body: bool) -> None:
    """Refuses a layer with an argument that Keras could not record: loading would lose it.

    Args:
        layer: A composite whose class has no `get_config` of its own.
        has_body: Whether the config has a body, which is one of the arguments.

    Raises:
        NotImplementedError: If there is such an argument.
    """
    names = list(_own_arguments(type(layer)))
    if recorded_arguments(layer) is None and len(names) > has_body:
        raise NotImplementedError(
            f"Keras cannot record the arguments {names} of {type(layer).__name__} by itself, "
            "because not all of them are numbers, strings or the like. Expected a `get_config` "
            "that adds to `super().get_config()` what the constructor needs besides the body."
        )


def _own_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a constructor that are not those of every layer."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    of_all = ("name", "dtype", "trainable", "autocast", "activity_regularizer")
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.kind not in star and p.name not in of_all}
