"""A model as a tree of text."""

import math

from functional_llm.graph.looking.changes import INSIDE, find_changes
from functional_llm.graph.selection import walk
from functional_llm.graph.types import Layer


def tree_view(model: Layer, depth: int | None = None, original: Layer | None = None) -> str:
    """Returns the layers of a model as an indented list, with counts of their weights.

    Args:
        model: A functional model or a built CompositeLayer.
        depth: How deep to go; `None` for all levels.
        original: The model that this one was rewired from: marks what is new or another with `+`,
            what has something such inside with `*`, and what only the original has with `-`.

    Returns:
        A line for each layer: its name, its class, the number of weights, and how many of those
        train in this model.

    Raises:
        TypeError: If a model has no graph.
        ValueError: If it has none yet.
    """
    changes = find_changes(model, original)
    trainable = {id(v) for v in model.trainable_variables}
    lines = [_line(model, "", "", trainable), *_removed("  ", changes.removed.get(""))]
    for path, layer in walk(model, composites=True):
        level = path.count("/") + 1
        if depth is None or level <= depth:
            kind = changes.kinds.get(path, "")
            mark = {"": "", INSIDE: "*"}.get(kind, "+")
            lines.append(_line(layer, "  " * level, mark, trainable))
        if depth is None or level < depth:
            lines += _removed("  " * (level + 1), changes.removed.get(path))
    return "\n".join(lines)


def _removed(indent: str, names: list[str] | None) -> list[str]:
    return [f"{indent}- {name}" for name in names or ()]


def _line(layer: Layer, indent: str, mark: str, trainable: set[int]) -> str:
    sizes = {id(v): math.prod(v.shape) for v in layer.weights}
    total = sum(sizes.values())
    share = sum(size for key, size in sizes.items() if key in trainable)
    words = f"{indent}{mark and mark + ' '}{layer.name} ({type(layer).__name__})"
    if not total:
        return words
    return f"{words}  {total:,} weights, {share:,} trainable ({share / total:.1%})"
