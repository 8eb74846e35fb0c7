"""Paths of layers, and layers and weights among the attributes of a layer."""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

import keras

from functional_llm.graph.own_weights import weight_of
from functional_llm.graph.types import Layer

Names: TypeAlias = tuple[str, ...]  # of layers, from the outermost inwards
Part: TypeAlias = Any  # a layer, or a weight that an `OwnWeight` of the graph holds


def layer_paths(layers: Iterable[Layer], wanted: Collection[int] | None = None) -> dict[int, Names]:
    """Returns the names that lead to each layer, by its id, into nested graphs.

    A weight that an `OwnWeight` holds has the path of that one.

    Args:
        layers: The layers of a graph.
        wanted: The ids to look for: what is deeper than all of them is left out. Defaults to all.
    """
    paths: dict[int, Names] = {}
    missing = None if wanted is None else set(wanted)
    queue: deque[tuple[Layer, Names]] = deque((layer, (layer.name,)) for layer in layers)
    while queue and (missing is None or missing):
        layer, path = queue.popleft()
        if id(layer) in paths:
            continue
        found = {id(layer), id(weight_of(layer))} - {id(None)}
        paths |= {key: path for key in found if key not in paths}
        if missing is not None:
            missing -= found
        queue.extend((inner, (*path, inner.name)) for inner in getattr(layer, "layers", ()))
    return paths


def part_at(layers: Iterable[Layer], path: Iterable[str], of_kind: Part) -> Part | None:
    """Returns the layer that these names lead to, or its weight if `of_kind` is a weight."""
    layer = layer_at(layers, path)
    return weight_of(layer) if isinstance(of_kind, keras.Variable) else layer


def layer_at(layers: Iterable[Layer], path: Iterable[str]) -> Layer | None:
    """Returns the layer that these names lead to, or `None`."""
    found = None
    for name in path:
        found = next((layer for layer in layers if layer.name == name), None)
        layers = getattr(found, "layers", ())
    return found


def find_layer(layers: list[Layer], name: str | None, index: int | None, owner: str) -> Layer:
    """Returns the layer with this name, or at this index.

    Args:
        layers: Where to look.
        name: A name, or `None`.
        index: An index, or `None`.
        owner: Whose layers they are, for messages.

    Raises:
        ValueError: If there is none, or not one of both is given.
    """
    if (name is None) == (index is None):
        raise ValueError(f"Expected a name or an index, received {name=}, {index=}.")
    if index is None:
        found = next((layer for layer in layers if layer.name == name), None)
    else:
        found = layers[index] if -len(layers) <= index < len(layers) else None
    if found is None:
        which = f"'{name}'" if index is None else f"at index {index}"
        raise ValueError(f"No layer {which} in '{owner}'. It has: {[x.name for x in layers]}.")
    return found


def map_parts(fn: Callable[[str, Part], object], value: Any, at: str = "") -> Any:
    """Returns attributes with their layers and weights replaced.

    Args:
        fn: `fn(where, part)` returns what comes in a layer's or a weight's place; `where` is
            "name.index".
        value: A dict of attributes. Dicts, lists, tuples and sets in it are looked through.
        at: For the recursion only.
    """
    if isinstance(value, (keras.layers.Layer, keras.Variable)):
        return fn(at[1:], value)
    if isinstance(value, dict):
        return {key: map_parts(fn, x, f"{at}.{key}") for key, x in value.items()}
    if isinstance(value, (list, tuple, set)):
        values = [map_parts(fn, x, f"{at}.{i}") for i, x in enumerate(value)]
        if isinstance(value, tuple):
            return type(value)(*values) if hasattr(value, "_replace") else tuple(values)
        return set(values) if isinstance(value, set) else values
    return value


def parts_of(value: Any) -> dict[str, Part]:
    """Returns where -> layer or weight, for those among attributes, as `map_parts` finds them."""
    parts: dict[str, Part] = {}
    map_parts(parts.__setitem__, value)
    return parts


def moved_parts(
    attributes: dict[str, Any], layers: Iterable[Layer], new_layers: Iterable[Layer]
) -> dict[str, Any]:
    """Returns attributes in which what is in a graph is what is at the same place in another.

    The place is that of the name, or else of the order, if both graphs have as many layers. What is
    in neither stays; `None` comes where the new graph has nothing.

    Args:
        attributes: What is set on the layer that has the graph.
        layers: Those of its graph.
        new_layers: Those of the other graph.
    """
    layers, new_layers = list(layers), list(new_layers)
    wanted = {id(part) for part in parts_of(attributes).values()}
    old = layer_paths(layers, wanted) if wanted else {}

    def replace(_: str, part: Part) -> Part | None:
        if id(part) not in old:
            return part
        there = part_at(new_layers, old[id(part)], part)
        if there is None and id(part) in layer_paths(new_layers, {id(part)}):
            return part  # at another place
        if there is None and len(layers) == len(new_layers):
            pairs = zip(layers, new_layers, strict=True)
            return next((new for old, new in pairs if old is part), None)
        return there

    return map_parts(replace, attributes)
