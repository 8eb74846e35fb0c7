"""Boxes, and the arrows between them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from functional_llm.graph.looking.facts import Weight
from functional_llm.graph.types import JSON


@dataclass
class Box:
    """A layer, operations, an input, or a block of boxes that repeats.

    Args:
        kind: `"layer"`, `"graph"` (a layer with a graph inside), `"operations"`, `"input"`, or
            `"block"`.
        paths: Of all layers that it stands for; of operations, those of the layers they are in.
        title: A name, a formula, or nothing.
        class_name: Of the layer.
        times: How often it stands in a row.
        takes: Names of what comes from elsewhere, without an arrow.
        returns: Names under which the graph around it returns what it makes.
        change: As in `Changes`, or empty.
        lines: What is other than in the model beside this one.
        removed: What only that one has inside.
        weights: Its weights.
        quantization: Such as `int8`, or empty.
        config: Its config.
        given: Arguments of the call that are no tensors, such as `reverse=True`.
        inputs: Name, shape and dtype of what it takes.
        outputs: Shapes and dtypes of what it makes.
        level: What is inside.
        key: Equal for boxes that show the same.
        formula: Of operations, in full.
    """

    kind: str
    paths: list[str]
    title: str
    class_name: str = ""
    times: int = 1
    takes: list[str] = field(default_factory=list)
    returns: list[str] = field(default_factory=list)
    change: str = ""
    lines: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    quantization: str = ""
    config: JSON = field(default_factory=dict)
    given: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    level: "Level | None" = None
    key: str = ""
    formula: str = ""

    def walk(self) -> "Iterator[Box]":
        """Yields the box and all in it."""
        yield self
        for box in self.level.boxes if self.level else ():
            yield from box.walk()


@dataclass
class Arrow:
    """A value that goes from one box to another.

    Args:
        source: Index of the box that makes it.
        target: Index of a box that takes it.
        specs: Shapes and dtypes.
    """

    source: int
    target: int
    specs: list[str]


@dataclass
class Level:
    """The boxes of one graph in an order in which they can be run, and the arrows between them."""

    boxes: list[Box]
    arrows: list[Arrow]


def tidy(level: Level) -> Level:
    """Puts inputs first, and names a value that several take to those far off, without an arrow.

    Not so what is of the shape of its taker's output: the stream that branches return to.
    """
    order = sorted(range(len(level.boxes)), key=lambda i: level.boxes[i].kind != "input")
    places = {old: new for new, old in enumerate(order)}
    tidy = Level([level.boxes[i] for i in order], [])
    every = [Arrow(places[x.source], places[x.target], x.specs) for x in level.arrows]
    rows = rows_of(Level(tidy.boxes, every))
    takers = Counter(arrow.source for arrow in every)
    for arrow in every:
        source, target = tidy.boxes[arrow.source], tidy.boxes[arrow.target]
        is_far = rows[arrow.target] - rows[arrow.source] > 1 and takers[arrow.source] > 1
        if is_far and source.kind != "input" and not {*arrow.specs} & {*target.outputs}:
            note(target.takes, source.title)
        else:
            tidy.arrows.append(arrow)
    return tidy


def rows_of(level: Level) -> list[int]:
    """Returns for each box how many others must come before it, one after another."""
    rows = [0] * len(level.boxes)
    for arrow in sorted(level.arrows, key=lambda arrow: arrow.target):
        rows[arrow.target] = max(rows[arrow.target], rows[arrow.source] + 1)
    return rows


def joined(boxes: list[Box]) -> Box:
    """Returns the first of equal boxes, with the paths of all of them at every depth."""
    first = boxes[0]
    if len(boxes) == 1:
        return first
    for parts in zip(*(box.walk() for box in boxes), strict=True):
        if parts[0].kind != "block" and parts[0].kind != "input":
            parts[0].paths = list(dict.fromkeys(path for part in parts for path in part.paths))
    if first.kind != "operations":
        first.title = span([path.rpartition("/")[2] for path in first.paths])
    return first


def span(names: Sequence[str]) -> str:
    """Returns names such as decoder_0, decoder_1, decoder_2, decoder_4 as `decoder_0–2, 4`."""
    stem = names[0].rstrip("0123456789")
    ends = [name.removeprefix(stem) for name in names]
    if len(names) == 1 or not all(
        x.isdigit() and name.startswith(stem) for x, name in zip(ends, names, strict=True)
    ):
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    numbers = sorted(map(int, ends))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return stem + ", ".join(f"{a}–{b}" if a < b else str(a) for a, b in runs)


def level_key(level: Level | None) -> str:
    """Returns what levels that show the same have in common."""
    if level is None:
        return ""
    boxes = [(box.kind, box.key, box.times, level_key(box.level)) for box in level.boxes]
    return f"{boxes} {[(a.source, a.target) for a in level.arrows]}"


def note(names: list[str], name: str) -> None:
    """Appends a name that is not there yet."""
    if name not in names:
        names.append(name)
