"""What is set on a composite, beside its graph: how a file holds it.

The constructor sets most of it again. Where the constructor cannot know, in a layer of the graph, a
weight of it, or what `functional_build` has set, the config says it: "attributes" has the place in
the graph of each layer and weight, "made" has what `functional_build` has set.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import keras

from functional_llm.graph.layer_paths import (
    Part,
    layer_at,
    layer_paths,
    map_parts,
    part_at,
    parts_of,
)
from functional_llm.graph.own_weights import weight_of
from functional_llm.graph.structure_json import decode, encode
from functional_llm.graph.types import JSON, Layer

_PLAIN = (bool, int, float, str)
_PART = "part of the graph"  # its place is among "attributes"
_PLACE = "place"  # the name of what stands for a part until the graph is there


def fingerprints(attributes: dict[str, Any]) -> dict[str, Any]:
    """Returns what changes when an attribute is set again, or something in its containers."""

    def look(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, look(x)) for key, x in value.items()]
        return [look(x) for x in value] if isinstance(value, (list, tuple, set)) else id(value)

    return {key: look(value) for key, value in attributes.items()}


def attributes_config(
    attributes: dict[str, Any], made: Iterable[str], layers: list[Layer], name: str
) -> JSON:
    """Returns what a config says of the attributes of a composite.

    Args:
        attributes: Those that a subclass or a user has set.
        made: The names of those that `functional_build` has set.
        layers: Those of the graph.
        name: The composite's name, for messages.

    Raises:
        NotImplementedError: If `functional_build` has set something that a file cannot hold.
    """
    parts = parts_of(attributes)
    paths = layer_paths(layers, {id(part) for part in parts.values()}) if parts else {}

    def leaf(key: str, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if id(value) in paths:
            return {_PART: isinstance(value, keras.Variable)}
        if not isinstance(value, (keras.KerasTensor, keras.Variable)) and _is_no_lambda(value):
            try:
                return {"object": keras.saving.serialize_keras_object(value)}
            except (TypeError, NotImplementedError, ValueError):
                pass
        raise NotImplementedError(
            f"'{name}' was rewired, and `functional_build` has set `{key}` on it, to a "
            f"{type(value).__name__} that a file cannot hold. Expected plain values, layers, or "
            "what has a `get_config`. Set it in the constructor, or give it to a layer there."
        )

    return {
        "attributes": {at: paths.get(id(part)) for at, part in parts.items()},
        "made": {
            key: encode(attributes[key], partial(leaf, key)) for key in made if key in attributes
        },
    }


def restore_attributes(config: JSON, attributes: dict[str, Any], layers: list[Layer]) -> Any:
    """Returns the attributes that `attributes_config` stored.

    Args:
        config: From `attributes_config`.
        attributes: Those that the constructor has set. The layers and weights of the graph come in
            the place of those among them.
        layers: Those of the graph.
    """
    places = config["attributes"]
    weight = keras.Variable("zeros", shape=(), trainable=False, name=_PLACE)
    stand_ins = {True: weight, False: keras.layers.Identity(name=_PLACE)}

    def leaf(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if _PART in value:
            return stand_ins[value[_PART]]
        return keras.saving.deserialize_keras_object(value["object"])

    known = {**attributes, **{key: decode(x, leaf) for key, x in config.get("made", {}).items()}}
    for at, path in places.items():  # set by a user, or in a file without "made"
        if path is not None and "." not in at and known.get(at) is None:
            layer = layer_at(layers, path)
            known[at] = layer if weight_of(layer) is None else weight_of(layer)

    def replace(at: str, part: Part) -> Part | None:
        path = places.get(at)
        if path is None:  # it has no place in the graph, or was lost when that was rewired
            return part if at in places else None
        return part_at(layers, path, part)

    return map_parts(replace, known)


def _is_no_lambda(value: Any) -> bool:
    return getattr(value, "__name__", "") != "<lambda>"
