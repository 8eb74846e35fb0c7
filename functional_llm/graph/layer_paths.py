"""Paths of layers, and layers among the attributes of a layer."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras

from functional_llm.graph.types import Layer

Names: TypeAlias = tuple[str, ...]  # of layers, from the outermost inwards


def layer_paths(layers: Iterable[Layer], above: Names = ()) -> dict[int, Names]:
    """Returns the names that lead to each layer, by its id, into nested graphs.

    Args:
        layers: The layers of a graph.
        above: The names that lead to that graph.
    """
    paths: dict[int, Names] = {}
    for layer in layers:
        path = (*above, layer.name)
        paths.setdefault(id(layer), path)
        for inner, inner_path in layer_paths(getattr(layer, "layers", ()), path).items():
            paths.setdefault(inner, inner_path)
    return paths


def layer_at(layers: Iterable[Layer], path: Iterable[str]) -> Layer | None:
    """Returns the layer that these names lead to, or `None`."""
    found = None
    for name in path:
        found = next((layer for layer in layers if layer.name == name), None)
        layers = getattr(found, "layers", ())
    return found


def map_layers(fn: Callable[[str, Layer], object], value: Any, at: str = "") -> Any:
    """Returns attributes with their layers replaced.

    Args:
        fn: `fn(where, layer)` returns what comes in a layer's place; `where` is "name.index".
        value: A dict of attributes. Plain dicts, lists and tuples in it are looked through.
        at: For the recursion only.
    """
    if isinstance(value, keras.layers.Layer):
        return fn(at[1:], value)
    if isinstance(value, dict):
        return {key: map_layers(fn, x, f"{at}.{key}") for key, x in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        values = [map_layers(fn, x, f"{at}.{i}") for i, x in enumerate(value)]
        return tuple(values) if isinstance(value, tuple) else values
    return value


def moved_layers(
    attributes: dict[str, Any], layers: Iterable[Layer], new_layers: Iterable[Layer]
) -> dict[str, Any]:
    """Returns attributes in which the layers of a graph are those at the same place in another.

    A layer that both graphs have, or neither, stays; `None` comes where the new graph has no layer.

    Args:
        attributes: What is set on the layer that has the graph.
        layers: Those of its graph.
        new_layers: Those of the other graph.
    """
    new_layers = list(new_layers)
    old, new = layer_paths(layers), layer_paths(new_layers)

    def replace(_: str, layer: Layer) -> Layer | None:
        kept = id(layer) in new or id(layer) not in old
        return layer if kept else layer_at(new_layers, old[id(layer)])

    return map_layers(replace, attributes)
