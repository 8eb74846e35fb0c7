"""Looking at a model: a tree of its layers as text, and a picture of its graph.

Both mark what a rewiring changed.
"""

from pathlib import Path
from typing import Any

import keras

from functional_llm.graph.rewiring import calls
from functional_llm.graph.selection import inner_layers, walk

_NEW, _CHANGED = "#ffd58a", "#fff3d6"


def tree_view(model: Any, depth: int | None = None, original: Any = None) -> str:
    """Returns the layers of a model as an indented list, with counts of their weights.

    Args:
        model: A functional model or a built CompositeLayer.
        depth: How deep to go; `None` for all levels.
        original: The model that this one was rewired from: marks what is new with `+`, and what
            has something new inside with `*`.

    Returns:
        A line for each layer: its name, its class, the number of weights, and how many of those
        train in this model.
    """
    trainable = {id(v) for v in model.trainable_variables}
    marks = _marks(model, original)
    lines = [_line(model, "", "", trainable)]
    for path, layer in walk(model, composites=True):
        level = path.count("/") + 1
        if depth is None or level <= depth:
            lines.append(_line(layer, "  " * level, marks.get(path, ""), trainable))
    return "\n".join(lines)


def _line(layer: Any, indent: str, mark: str, trainable: set[int]) -> str:
    sizes = {id(v): _size(v) for v in layer.weights}
    total = sum(sizes.values())
    share = sum(size for key, size in sizes.items() if key in trainable)
    words = f"{indent}{mark and mark + ' '}{layer.name} ({type(layer).__name__})"
    if not total:
        return words
    return f"{words}  {total:,} weights, {share:,} trainable ({share / total:.1%})"


def _size(variable: Any) -> int:
    size = 1
    for dimension in variable.shape:
        size *= dimension
    return size


def _marks(model: Any, original: Any) -> dict[str, str]:
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


def _identity(layer: Any) -> Any:
    return type(layer), [id(v) for v in layer.variables]


def plot(model: Any, to_file: str | Path, depth: int = 1, original: Any = None) -> Path:
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
        ValueError: If the file's ending is none of these.
    """
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
    """Boxes for calls and arrows for tensors, into a picture."""

    def __init__(self, pydot: Any, marks: dict[str, str], depth: int) -> None:
        self._pydot = pydot
        self._marks = marks
        self._depth = depth
        self._count = 0

    def graph(self, layer: Any, path: str, picture: Any) -> tuple[list[Any], list[Any]]:
        """Draws a graph; returns the boxes of its inputs and of its outputs."""
        graph = getattr(layer, "graph", layer)
        boxes: dict[int, tuple[Any, Any]] = {}  # tensor -> box to draw from, cluster to cut at
        entries = [self._box(picture, x.name, "#e8eef7") for x in graph.inputs]
        for x, box in zip(graph.inputs, entries, strict=True):
            boxes[id(x)] = (box, None)
        for node in calls(graph):
            name = node.operation.name
            first, last, cluster = self._call(node, f"{path}/{name}" if path else name, picture)
            for i, x in enumerate(node.arguments.keras_tensors):
                source, left = boxes[id(x)]
                ends = {"ltail": left} if left else {}
                ends |= {"lhead": cluster} if cluster else {}
                target = first[min(i, len(first) - 1)]
                picture.add_edge(self._pydot.Edge(source, target, **ends))
            for i, x in enumerate(node.outputs):
                boxes[id(x)] = (last[min(i, len(last) - 1)], cluster)
        return entries, [boxes[id(x)][0] for x in graph.outputs]

    def _call(self, node: Any, path: str, picture: Any) -> tuple[list[Any], list[Any], str | None]:
        layer = node.operation
        mark = self._marks.get(path, "")
        color = {"+": _NEW, "*": _CHANGED}.get(mark, "white")
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

    def _box(self, picture: Any, label: str, color: str) -> Any:
        self._count += 1
        box = self._pydot.Node(f"n{self._count}", label=label, fillcolor=color)
        picture.add_node(box)
        return box
