"""A picture of a graph, drawn by Graphviz."""

import html
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from functional_llm.graph.looking.boxes import Arrow, Box, Level
from functional_llm.graph.looking.changes import ADDED, CHANGED, INSIDE
from functional_llm.graph.looking.outline import outline
from functional_llm.graph.selection import matches
from functional_llm.graph.types import Layer

Picture: TypeAlias = Any  # a pydot.Graph; pydot has no types
Node: TypeAlias = Any  # a pydot.Node
Ends: TypeAlias = tuple[Node, Node, str | None]  # where arrows come in and go out; the cluster

_COLORS = {ADDED: "#cdeccd", CHANGED: "#ffd58a", INSIDE: "#fff3d6"}
_KINDS = {"graph": "#e8eef7", "operations": "#f4f4f4", "layer": "white", "input": "white"}
_GREY, _BLUE, _GREEN, _RED = "#666666", "#2457a6", "#1f7a3a", "#b3261e"
_LINE = 44  # characters


def plot(
    model: Layer,
    to_file: str | Path,
    depth: int = 1,
    original: Layer | None = None,
    open: str | Iterable[str] = (),
    shapes: bool = False,
) -> Path:
    """Draws the graph of a model, with the graphs inside it down to a depth.

    Layers that are equal and follow one another are drawn once, with how many there are; so is a
    block of several that repeats. Operations between layers are one box with their formula. An
    input of a graph is named in blue (◂) in the boxes that take it, an output in green (▸).

    Args:
        model: A functional model or a built CompositeLayer.
        to_file: The picture to write: `.svg`, `.png`, `.pdf`, or `.dot`.
        depth: How many levels of layers to open: 0 draws the outermost graph only.
        original: The model that this one was rewired from: what is new is green, what is other
            orange, what has such inside pale, and the names of what is gone are red.
        open: Patterns of paths, as of `select`, of more layers to open; those around them open too.
        shapes: Whether arrows say shapes and dtypes; `·` is a size that may change.

    Returns:
        The path of the file.

    Raises:
        ImportError: If pydot or Graphviz's `dot` is missing.
        TypeError: If a model has no graph.
        ValueError: If it has none yet, the file's ending is none of these, or a pattern matches
            nothing.
    """
    to_file = Path(to_file)
    kind = to_file.suffix.lstrip(".")
    if kind not in ("svg", "png", "pdf", "dot"):
        raise ValueError(f"Expected a file .svg, .png, .pdf or .dot, received {to_file}.")
    box = outline(model, original)
    opened = _opened(box, [open] if isinstance(open, str) else list(open))
    try:
        import pydot
    except ImportError as error:
        raise ImportError("Drawing needs pydot and Graphviz: pip install pydot.") from error
    picture: Picture = pydot.Dot(rankdir="TB", compound="true", nodesep="0.2", ranksep="0.28")
    picture.set_graph_defaults(fontname="sans-serif", fontsize="11")
    picture.set_node_defaults(
        shape="box", style="rounded,filled", fontname="sans-serif", fontsize="11", margin="0.1,0.05"
    )
    picture.set_edge_defaults(fontname="sans-serif", fontsize="9", arrowsize="0.6", color="#444444")
    if box.level is not None and box.level.boxes:
        _Drawing(pydot, depth, opened, shapes).level(box.level, picture)
    if original is not None:
        picture.set_label(_legend(box))
        picture.set_labelloc("b")
    try:
        picture.write(str(to_file), format="raw" if kind == "dot" else kind)
    except FileNotFoundError as error:
        raise ImportError(
            "Drawing needs Graphviz's program `dot` on the PATH: install Graphviz, or write a "
            ".dot file."
        ) from error
    return to_file


def _opened(box: Box, patterns: list[str]) -> set[str]:
    """Returns the paths of the layers with a graph that patterns match, and of those around."""
    graphs = [inner for inner in box.walk() if inner.kind == "graph"]
    paths: set[str] = set()
    for pattern in patterns:
        found = {path for inner in graphs for path in inner.paths if matches(path, pattern)}
        if not found:
            raise ValueError(
                f"No layer with a graph inside matches '{pattern}'. There are: "
                f"{', '.join(inner.paths[0] for inner in graphs[1:9])}."
            )
        paths |= found
    return {path[:end] for path in paths for end in range(1, len(path) + 1)}


class _Drawing:
    """Boxes for layers and arrows for tensors, into a picture.

    Args:
        pydot: The module.
        depth: How many levels of layers to open.
        opened: Paths of more layers to open.
        shapes: Whether arrows say shapes.
    """

    def __init__(self, pydot: ModuleType, depth: int, opened: set[str], shapes: bool) -> None:
        self._pydot = pydot
        self._depth, self._opened, self._shapes = depth, opened, shapes
        self._count = 0

    def level(self, level: Level, picture: Picture) -> tuple[Node, Node]:
        """Draws the boxes of a graph; returns the first and the last."""
        ends = [self._box(box, picture) for box in level.boxes]
        for arrow in level.arrows:
            picture.add_edge(self._edge(arrow, ends[arrow.source], ends[arrow.target]))
        return ends[0][0], ends[-1][1]

    def _edge(self, arrow: Arrow, source: Ends, target: Ends) -> Any:
        options = {"label": "\n".join(arrow.specs[:2])} if self._shapes else {}
        options |= {"ltail": source[2]} if source[2] else {}
        options |= {"lhead": target[2]} if target[2] else {}
        return self._pydot.Edge(source[1], target[0], **options)

    def _box(self, box: Box, picture: Picture) -> Ends:
        self._count += 1
        if box.level is not None and box.level.boxes and self._is_open(box):
            dashed = box.kind == "block"
            color = _COLORS.get(box.change, "white" if dashed else "#f7f9fc")
            cluster = self._pydot.Cluster(
                f"c{self._count}",
                label=_label(box, full=False),
                style="rounded,dashed" if dashed else "rounded,filled",
                fillcolor=color,
                color="#888888",
                labeljust="l",
                labelloc="t",
            )
            first, last = self.level(box.level, cluster)
            picture.add_subgraph(cluster)
            return first, last, cluster.get_name()
        if box.kind == "input":
            look = {
                "shape": "ellipse",
                "label": box.title,
                "margin": "0.04,0.02",
                "width": "0.3",
                "height": "0.26",
            }
            look = look if box.title else {"shape": "point", "width": "0.06"}
        else:
            look = {"label": _label(box, full=True)}
        color = _COLORS.get(box.change, _KINDS[box.kind])
        node = self._pydot.Node(f"n{self._count}", fillcolor=color, color="#888888", **look)
        picture.add_node(node)
        return node, node, None

    def _is_open(self, box: Box) -> bool:
        if box.kind == "block":
            return True
        depth = box.paths[0].count("/")
        return depth < self._depth or any(path in self._opened for path in box.paths)


def _label(box: Box, full: bool) -> str:
    """Returns Graphviz's HTML for what stands in a box, or above the boxes in it."""
    times = f" ×{box.times}" if box.times > 1 else ""
    lines = []
    if box.kind == "operations":
        lines += [f"<i>{html.escape(line)}</i>" for line in _wrapped(box.title)]
    else:
        lines += [f"<b>{html.escape(line)}</b>" for line in _wrapped(f"{box.title}{times}".strip())]
    described = ", ".join(x for x in (_kind(box), box.given) if x)
    if described:
        lines.append(_colored(described, _GREY))
    says_it = box.kind == "block" or box.title == box.formula  # what it takes
    lines += _listed("◂", [] if says_it else box.takes, _BLUE)
    if full:
        lines += _listed("▸", box.returns, _GREEN)
    lines += [_colored(f"− {name}", _RED) for name in box.removed]
    return f"<{'<br/>'.join(lines) or ' '}>"


def _listed(sign: str, names: list[str], color: str) -> list[str]:
    text = _wrapped(f"{sign} {', '.join(names)}") if names else []
    return [_colored(line, color) for line in text]


def _kind(box: Box) -> str:
    kind = "" if box.class_name == "CompositeLayer" else box.class_name
    return f"{kind}, {box.quantization}" if box.quantization else kind


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for piece in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(piece) >= _LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".strip()
    return lines


def _colored(text: str, color: str) -> str:
    return f'<font color="{color}" point-size="10">{html.escape(text)}</font>'


def _legend(box: Box) -> str:
    words = {ADDED: "new", CHANGED: "other than in the original", INSIDE: "has such inside"}
    used = {inner.change for inner in box.walk()}
    cells = [
        f'<td bgcolor="{_COLORS[change]}">{text}</td>'
        for change, text in words.items()
        if change in used
    ]
    cells += [f"<td>{_colored(f'− {name}', _RED)}</td>" for name in box.removed]
    cells = cells or ["<td>the same as the original</td>"]
    return f'<<table border="0" cellspacing="6" cellpadding="4"><tr>{"".join(cells)}</tr></table>>'
