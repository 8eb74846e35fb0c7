"""A summary of a model that fits on a screen: equal layers once, and what they weigh."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import keras
import numpy as np

from functional_llm.graph.selection import check_graph, inner_layers
from functional_llm.graph.types import Layer

_HEAD = ("layer", "class", "weights", "parameters", "trainable")


class ReadableSummary:
    """Gives a model a short `summary`; to be named before Keras's class."""

    def summary(
        self, *args: Any, print_fn: Callable[[str], object] | None = None, **kwargs: Any
    ) -> None:
        """Prints the layers with weights, equal ones once; parameters, dtypes and memory.

        `keras.Model.summary(model)` prints Keras's own, as do its options here: `expand_nested`,
        `show_trainable`, `line_length` and the like.

        Args:
            *args: Of Keras's own summary.
            print_fn: Gets the text, a line at a time, instead of the terminal.
            **kwargs: Of Keras's own summary.
        """
        if args or kwargs:
            keras.Model.summary(self, *args, print_fn=print_fn, **kwargs)
            return
        for line in summarize(self).splitlines():
            (print_fn or print)(line)


def summarize(model: Layer) -> str:
    """Returns the layers of a model that have weights, those that are equal side by side once.

    Args:
        model: A functional model or a built CompositeLayer.

    Raises:
        TypeError: If the model has no graph.
        ValueError: If it has none yet.
    """
    check_graph(model)
    trainable = {id(v) for v in model.trainable_variables}
    rows = [_HEAD, *_rows(inner_layers(model) or (), trainable, "", {})]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [_align(row, widths) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *_totals(model, trainable)])


def _rows(
    layers: Iterable[Layer], trainable: set[int], indent: str, shown: dict[Any, str]
) -> Iterator[tuple[str, str, str, str, str]]:
    weighty = [layer for layer in layers if layer.weights]

    def kind(layer: Layer) -> tuple[Any, ...]:
        return layer.name.rstrip("0123456789"), _shape_of(layer, trainable)

    for key, group in groupby(weighty, kind):
        first, *others = group
        name = first.name if not others else f"{first.name} to {others[-1].name}"
        times = "" if not others else f" x {len(others) + 1}"
        inner = inner_layers(first)
        counts = (_count(first.weights), _count(x for x in first.weights if id(x) in trainable))
        each, train = (f"{count:,}{times}" if count else "0" for count in counts)
        shapes = ", ".join(_shape(v) for v in first.weights)
        if inner:
            shapes = f"as in {shown[key]}" if key in shown else ""
        yield f"{indent}{name}{times}", type(first).__name__, shapes, each, train
        if inner and key not in shown:
            shown[key] = first.name
            yield from _rows(inner, trainable, indent + "  ", shown)


def _shape_of(layer: Layer, trainable: set[int]) -> tuple[Any, ...]:
    """Returns what equal layers have in common: all but names and values."""
    weights = [(tuple(v.shape), str(v.dtype), id(v) in trainable) for v in layer.weights]
    inner = inner_layers(layer) or ()
    return type(layer), tuple(weights), tuple(_shape_of(x, trainable) for x in inner if x.weights)


def _totals(model: Layer, trainable: set[int]) -> Iterator[str]:
    variables = {id(v): v for v in model.variables}.values()
    total, train = _count(variables), _count(v for v in variables if id(v) in trainable)
    by_dtype: dict[str, int] = {}
    for v in variables:
        by_dtype[str(v.dtype)] = by_dtype.get(str(v.dtype), 0) + math.prod(v.shape)
    size = sum(count * np.dtype(dtype).itemsize for dtype, count in by_dtype.items())
    shares = ", ".join(
        dtype if len(by_dtype) == 1 else f"{count:,} {dtype}" for dtype, count in by_dtype.items()
    )
    yield f"parameters: {total:,}, of which {train:,} train"
    yield f"memory: {size / 1e6:,.1f} MB ({shares})"


def _count(variables: Iterable[keras.Variable]) -> int:
    return sum(math.prod(v.shape) for v in {id(v): v for v in variables}.values())


def _shape(variable: keras.Variable) -> str:
    return f"({', '.join(map(str, variable.shape))})"


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    is_number = (False, False, False, True, True)
    cells = zip(row, widths, is_number, strict=True)
    return "  ".join(x.rjust(n) if right else x.ljust(n) for x, n, right in cells).rstrip()
