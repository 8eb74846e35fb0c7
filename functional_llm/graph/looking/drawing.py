"""Looking at a model: a tree of its layers as text, and a picture of its graph.

Both mark what a rewiring changed.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import keras

from functional_llm.graph.keras_private import calls
from functional_llm.graph.selection import check_graph, inner_graph, inner_layers, walk
from functional_llm.graph.types import Layer

Picture: TypeAlias = Any  # a pydot.Graph; pydot has no types
Box: TypeAlias = Any  # a pydot.Node

_NEW, _CHANGED = "#ffd58a", "#fff3d6"


def tree_view(model: Layer, depth: int | None = None, original: Layer | None = None) -> str:
    """Returns the layers of a model as an indented list, with counts of their weights.

    Args:
        model: A functional model or a built CompositeLayer.
        depth: How deep to go; `None` for all levels.
        original: The model that this one was rewired from: marks what is new with `+`, and what
            has something new inside with `*`.

    Returns:
        A line for each layer: its name, its class, the number of weights, and how many of those
        train in this model.

    Raises:
        TypeError: If the model has no graph.
        ValueError: If it has none yet.
    """
    check_graph(model)
    trainable = {id(v) for v in model.trainable_variables}
    marks = _marks(model, original)
    lines = [_line(model, "", "", trainable)]
    for path, layer in walk(model, composites=True):
        level = path.count("/") + 1
        if depth is None or level <= depth:
            lines.append(_line(layer, "  " * level, marks.get(path, ""), trainable))
    return "\n".join(lines)


def _line(layer: Layer, indent: str, mark: str, trainable: set[int]) -> str:
    sizes = {id(v): math.prod(v.shape) for v in layer.weights}
    total = sum(sizes.values())
    share = sum(size for key, size in sizes.items() if key in trainable)
    words = f"{indent}{mark and mark + ' '}{layer.name} ({type(layer).__name__})"
    if not total:
        return words
    return f"{words}  {total:,} weights, {share:,} trainable ({share / total:.1%})"


def _marks(model: Layer, original: Layer | None) -> dict[str, str]:
    """Path -> "+" for what is new, "*" for what has that inside."""
    if original is None:
        return {}
    before = {path: _identity(layer) for path, layer in walk(original, composites=True)}
    marks: dict[str, str] = {}
    for path, layer in walk(model, composites=True):
        is_leaf = inner_layers(layer) is None
        if path not in before or (is_leaf and before[path] != _identity(layer)):
            marks[path] = "+"
            for end, letter in enumerate(path):
                if letter == "/":
                    marks.setdefault(path[:end], "*")
    return marks


def _identity(layer: Layer) -> tuple[type, list[int]]:
    return type(layer), [id(v) for v in layer.variables]


def plot(model: Layer, to_file: str | Path, depth: int = 1, original: Layer | None = None) -> Path:
    """Draws the graph of a model, with the graphs inside it down to a depth.

    Args:
        model: A functional model or a built CompositeLayer.
        to_file: The picture to write: `.svg`, `.png`, `.pdf`, or `.dot`.
        depth: How many levels of layers to open: 0 draws the outermost graph only.
        original: The model that this one was rewired from: marks what is new (orange), and what
            has something new inside (pale).

    Returns:
        The path of the file.

    Raises:
        ImportError: If pydot or Graphviz's `dot` is missing.
        TypeError: If the model has no graph.
        ValueError: If it has none yet, or the file's ending is none of these.
    """
    check_graph(model)
    to_file = Path(to_file)
    kind = to_file.suffix.lstrip(".")
    if kind not in ("svg", "png", "pdf", "dot"):
        raise ValueError(f"Expected a file .svg, .png, .pdf or .dot, received {to_file}.")
    try:
        import pydot
    except ImportError as error:
        raise ImportError("Drawing needs pydot and Graphviz: pip install pydot.") from error
    picture = pydot.Dot(rankdir="TB", fontname="sans-serif", fontsize="11", compound="true")
    picture.set_node_defaults(
        shape="box", style="rounded,filled", fillcolor="white", fontname="sans-serif", fontsize="11"
    )
    _Drawing(pydot, _marks(model, original), depth).graph(model, "", picture)
    try:
        picture.write(str(to_file), format="raw" if kind == "dot" else kind)
    except FileNotFoundError as error:
        raise ImportError(
            "Drawing needs Graphviz's program `dot` on the PATH: install Graphviz, or write a "
            ".dot file."
        ) from error
    return to_file


class _Drawing:
    """Boxes for calls and arrows for tensors, into a picture.

    Args:
        pydot: The module.
        marks: Path -> "+" or "*", as for `tree_view`.
        depth: How many levels of layers to open.
    """

    def __init__(self, pydot: ModuleType, marks: dict[str, str], depth: int) -> None:
        self._pydot = pydot
        self._marks = marks
        self._depth = depth
        self._count = 0

    def graph(self, layer: Layer, path: str, picture: Picture) -> tuple[list[Box], list[Box]]:
        """Draws a graph; returns the boxes of its inputs and of its outputs."""
        graph = inner_graph(layer)
        boxes: dict[int, tuple[Box, str | None]] = {}  # tensor -> its box, and the cluster to cut
        entries = [self._box(picture, x.name, "#e8eef7") for x in graph.inputs]
        for x, box in zip(graph.inputs, entries, strict=True):
            boxes[id(x)] = (box, None)
        for call in calls(graph):
            name = call.operation.name
            first, last, cluster = self._call(
                call.operation, f"{path}/{name}" if path else name, picture
            )
            for i, x in enumerate(call.inputs):
                source, left = boxes[id(x)]
                ends = {"ltail": left} if left else {}
                ends |= {"lhead": cluster} if cluster else {}
                target = first[min(i, len(first) - 1)]
                picture.add_edge(self._pydot.Edge(source, target, **ends))
            for i, x in enumerate(call.outputs):
                boxes[id(x)] = (last[min(i, len(last) - 1)], cluster)
        return entries, [boxes[id(x)][0] for x in graph.outputs]

    def _call(
        self, layer: keras.Operation, path: str, picture: Picture
    ) -> tuple[list[Box], list[Box], str | None]:
        """Draws a call; returns the boxes to draw to, those to draw from, and its cluster."""
        color = {"+": _NEW, "*": _CHANGED}.get(self._marks.get(path, ""), "white")
        is_open = inner_layers(layer) is not None and path.count("/") < self._depth
        if not is_open or isinstance(layer, keras.Sequential):
            box = self._box(picture, f"{layer.name}\n{type(layer).__name__}", color)
            return [box], [box], None
        self._count += 1
        cluster = self._pydot.Cluster(
            f"c{self._count}", label=path, style="rounded,filled", fillcolor=color, color="#888888"
        )
        first, last = self.graph(layer, path, cluster)
        picture.add_subgraph(cluster)
        return first, last, cluster.get_name()

    def _box(self, picture: Picture, label: str, color: str) -> Box:
        self._count += 1
        box = self._pydot.Node(f"n{self._count}", label=label, fillcolor=color)
        picture.add_node(box)
        return box
