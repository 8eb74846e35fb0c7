"""Finding layers in a graph, at any depth: by path, by type, by predicate."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import keras

from functional_llm.graph.bodies import is_functional, no_graph_yet
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Layer

Condition: TypeAlias = str | type | Callable[[Layer, str], bool]
Where: TypeAlias = Condition | Iterable[Condition]


def inner_layers(layer: keras.Operation) -> list[Layer] | None:
    """Returns the layers of the graph inside a layer, or `None` if it is a leaf.

    Args:
        layer: A CompositeLayer, a functional or Sequential model, or any other layer.
    """
    if not isinstance(layer, CompositeLayer) and not is_functional(layer):
        return None
    return [x for x in layer.layers if not isinstance(x, keras.layers.InputLayer)]


def inner_graph(layer: keras.Operation) -> keras.Operation:
    """Returns the functional model inside a built CompositeLayer; any other layer as it is."""
    return layer.graph if isinstance(layer, CompositeLayer) else layer


def check_graph(model: Layer) -> None:
    """Refuses a model or layer without a graph.

    Raises:
        TypeError: If it can have none.
        ValueError: If it has none yet.
    """
    if isinstance(model, CompositeLayer):
        model.build_existing()
    if isinstance(model, (CompositeLayer, keras.Sequential)) and not model.built:
        raise no_graph_yet(model.name)
    if inner_layers(model) is None:
        raise TypeError(
            f"Expected a functional model or a CompositeLayer, received {type(model).__name__} "
            f"'{getattr(model, 'name', model)}', which has no graph to walk through."
        )


def walk(model: Layer, composites: bool = False) -> Iterator[tuple[str, Layer]]:
    """Yields (path, layer) for every leaf layer at any depth, each layer once.

    Args:
        model: A functional model or a built CompositeLayer.
        composites: Whether to yield the layers that have a graph inside, too, each before what is
            in it.

    Raises:
        TypeError: If the model has no graph.
        ValueError: If it has none yet.
    """
    check_graph(model)
    return _walk(model, "", composites, set())


def _walk(layer: Layer, path: str, composites: bool, seen: set[int]) -> Iterator[tuple[str, Layer]]:
    for inner in inner_layers(layer) or ():
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        inner_path = f"{path}/{inner.name}" if path else inner.name
        is_leaf = inner_layers(inner) is None
        if is_leaf or composites:
            yield inner_path, inner
        if not is_leaf:
            yield from _walk(inner, inner_path, composites, seen)


def select(model: Layer, where: Where) -> dict[str, Layer]:
    """Returns the layers of a model that match, by path, in the order of the graph.

    Args:
        model: A functional model or a built CompositeLayer.
        where: A pattern of paths, a class of layers, a predicate `(layer, path) -> bool`, or a
            list of those, of which any may match. In a pattern `*` stands for any characters
            within one name and `**` for any number of names: `"decoder_*/attention/query"`,
            `"decoder_1/**"`. A pattern without a slash is compared with the last name only:
            `"query"`.

    Raises:
        TypeError: If the model has no graph.
        ValueError: If it has none yet, or one of the conditions matches nothing. Near paths are
            named.
    """
    layers = dict(walk(model, composites=True))
    is_single = isinstance(where, (str, type)) or callable(where)
    chosen: set[str] = set()
    conditions: list[Condition] = [where] if is_single else list(where)  # type: ignore[list-item, arg-type]
    if not conditions:
        raise ValueError("Expected at least one pattern, class or predicate, received none.")
    for condition in conditions:
        test = _test(condition)
        found = {path for path, layer in layers.items() if test(layer, path)}
        if not found:
            raise ValueError(_nothing_found(model, condition, list(layers)))
        chosen |= found
    return {path: layer for path, layer in layers.items() if path in chosen}


def _test(condition: Condition) -> Callable[[Layer, str], bool]:
    if isinstance(condition, str):
        return lambda _, path: matches(path, condition)
    if isinstance(condition, type):
        return lambda layer, _: isinstance(layer, condition)
    if callable(condition):
        return condition
    raise TypeError(
        "Expected a pattern, a class of layers, a predicate (layer, path), or a list of them. "
        f"Received: {condition!r}."
    )


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern, as of `select`, describes a path."""
    text = path if "/" in pattern else path.rpartition("/")[2]
    return re.fullmatch(_regular_expression(pattern), text) is not None


def _regular_expression(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|/\*\*|\*\*|\*|\?|\[[^]/]+\])", pattern)
    special = {"**/": "(?:.*/)?", "/**": "/.*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(piece) or (piece if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _nothing_found(model: Layer, condition: Condition, paths: list[str]) -> str:
    if not isinstance(condition, str):
        what = condition.__name__ if hasattr(condition, "__name__") else repr(condition)
        return f"No layer of '{model.name}' matches {what}. It has {len(paths)} layers: see `walk`."
    by_name = {path.rpartition("/")[2]: path for path in reversed(paths)}
    names = difflib.get_close_matches(condition.rpartition("/")[2], list(by_name), 5, 0.5)
    near = difflib.get_close_matches(condition, paths, 8, 0.5) + [by_name[name] for name in names]
    shown = list(dict.fromkeys(near))[:8] or paths[:8]
    return (
        f"No layer of '{model.name}' matches '{condition}'. Near it: {', '.join(shown)}. "
        "`*` stays within one name, `**` crosses slashes."
    )
