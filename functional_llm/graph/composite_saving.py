"""How a CompositeLayer is saved: what its config holds beside the constructor's arguments.

Under the key "body" a config may have "graph", "structure" and "attributes" (a graph that no
constructor can make), "layers" (a list of layers that is not built yet), "input_spec" and
"autocast".
"""

import inspect
from typing import Any

import keras

from functional_llm.graph.bodies import BuiltGraph, ExistingGraph, LayerSequence
from functional_llm.graph.keras_private import recorded_arguments
from functional_llm.graph.layer_paths import Names, layer_at, layer_paths, map_layers
from functional_llm.graph.signature import Signature
from functional_llm.graph.structure_json import decode, encode
from functional_llm.graph.types import JSON, Layer, Nested


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


def graph_config(built: BuiltGraph) -> JSON:
    """Returns the config of a graph, and the places in it of the layers among the attributes.

    Args:
        built: The graph; `attributes` are those set on the composite.
    """
    paths = layer_paths(built.graph.layers)
    places: dict[str, Names | None] = {}
    map_layers(lambda at, layer: places.update({at: paths.get(id(layer))}), built.attributes)
    return {
        "graph": keras.saving.serialize_keras_object(built.graph),
        "structure": built.signature.get_config(),
        "attributes": places,
    }


def restore_graph(config: JSON, attributes: dict[str, Any]) -> BuiltGraph:
    """Returns the graph that `graph_config` stored.

    Args:
        config: From `graph_config`.
        attributes: Those that the constructor has set. The layers of the graph come in the place of
            the layers among them.
    """
    graph = keras.saving.deserialize_keras_object(config["graph"])
    places = config["attributes"]

    def replace(at: str, layer: Layer) -> Layer | None:
        path = places.get(at)
        if path is None:  # it has no place in the graph, or was lost when that was rewired
            return layer if at in places else None
        return layer_at(graph.layers, path)

    signature = Signature.from_config(config["structure"])
    return BuiltGraph(graph, signature, map_layers(replace, attributes))


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
