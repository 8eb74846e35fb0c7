"""A model as boxes and arrows, equal layers once: what the picture and the page draw."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
from keras import tree

from functional_llm.graph.keras_private import is_optional_input
from functional_llm.graph.looking.boxes import Arrow, Box, Level, joined, level_key, note, tidy
from functional_llm.graph.looking.changes import ADDED, CHANGED, INSIDE, Changes, find_changes
from functional_llm.graph.looking.facts import (
    config_of,
    key_of,
    quantization_of,
    weights_of,
)
from functional_llm.graph.looking.folding import Fold, fold
from functional_llm.graph.looking.formula import title, word
from functional_llm.graph.looking.units import Source, Unit, Units
from functional_llm.graph.selection import inner_layers
from functional_llm.graph.types import Layer

_Item: TypeAlias = int | Fold


def outline(model: Layer, beside: Layer | None = None) -> Box:
    """Returns a model as a box, with all that is in it.

    Args:
        model: A functional model or a built CompositeLayer.
        beside: The model to compare it with.

    Raises:
        TypeError: If one of them has no graph.
        ValueError: If one of them has none yet.
    """
    changes = find_changes(model, beside)
    trainable = {id(v) for v in model.trainable_variables}
    box = _Outline(changes, trainable).layer(model, "")
    box.removed = changes.removed.get("", [])
    return box


class _Outline:
    def __init__(self, changes: Changes, trainable: set[int]) -> None:
        self._changes = changes
        self._training = trainable

    def layer(self, layer: Layer, path: str) -> Box:
        has_graph = inner_layers(layer) is not None
        box = Box(
            kind="graph" if has_graph else "layer",
            paths=[path],
            title=layer.name,
            class_name=type(layer).__name__,
            change=self._changes.kinds.get(path, "") if path else "",
            lines=self._changes.lines.get(path, []),
            removed=self._changes.removed.get(path, []),
            weights=weights_of(layer, self._training),
            quantization=quantization_of(layer),
            config=config_of(layer),
        )
        if has_graph:
            box.level = _Graph(self, layer, path).level()
        inside = [level_key(box.level), box.weights, box.change, box.lines, box.removed]
        box.key = f"{key_of(layer)} {inside}"
        return box

    def operations(self, units: Units, unit: Unit, path: str) -> Box:
        text = units.formula(unit)
        box = Box("operations", [path], title(unit.calls, text), formula=text)
        if text in self._changes.formulas.get(path, ()):
            box.change = CHANGED if self._changes.removed.get(path) else ADDED
        words = [word(call.operation) for call in unit.calls]
        box.key = f"{words} {units.formula_without_names(unit)} {box.change}"
        return box


class _Graph:
    """Makes the level of one graph."""

    def __init__(self, outline: _Outline, layer: Layer, path: str) -> None:
        self._units = units = Units(layer)
        self._streams = _streams(units)
        self._boxes = []
        for unit in units.units:
            if unit.layer is None:
                box = outline.operations(units, unit, path)
            else:
                name = unit.layer.name
                box = outline.layer(unit.layer, f"{path}/{name}" if path else name)
                box.given = _given(unit)
                box.key += box.given
            self._describe(box, unit)
            self._boxes.append(box)
        named: dict[str, list[Box]] = {}
        for i, box in enumerate(self._boxes):
            if box.kind == "operations" and box.title != box.formula:
                named.setdefault(self._name_at_users(i) or box.title, []).append(box)
        for name, boxes in named.items():
            for i, box in enumerate(boxes, 1):
                box.title = f"{name} {i}" if len(boxes) > 1 and " " not in name else name

    def _name_at_users(self, place: int) -> str:
        """Returns the one name under which layers with a graph take what a unit makes."""
        made = {id(x) for x in self._units.units[place].outputs}
        names = set()
        for user in self._units.consumers[place]:
            call = self._units.units[user].calls[0]
            if inner_layers(call.operation) is None:
                return ""
            for path, x in tree.flatten_with_path(call.args):
                names |= {str(path[1]) if len(path) > 1 else ""} if id(x) in made else set()
        return names.pop() if len(names) == 1 else ""

    def _describe(self, box: Box, unit: Unit) -> None:
        keys = [key for x in unit.outputs for key in self._units.output_keys.get(id(x), ())]
        box.returns = list(dict.fromkeys(keys))
        names = [self._units.name_of(source.tensor) for source in unit.sources]
        specs = [_spec(source.tensor) for source in unit.sources]
        box.inputs = [f"{name}: {spec}" for name, spec in zip(names, specs, strict=True)]
        box.outputs = [_spec(x) for x in unit.outputs]
        box.key += f" {specs} {box.outputs} {box.returns}"

    def level(self) -> Level:
        folds = fold(self._units, lambda i, j: self._boxes[i].key == self._boxes[j].key)
        return self._level(folds, frozenset(range(len(self._boxes))), 1)

    def _level(self, items: Sequence[_Item], around: frozenset[int], times: int) -> Level:
        """Returns boxes for units and folds.

        Args:
            items: What stands there.
            around: The units of all repetitions of it; the last one shows how they are connected.
            times: How many repetitions there are.
        """
        last = frozenset(sorted(around)[-(len(around) // times) :])
        members = [
            last & (item.members if isinstance(item, Fold) else frozenset([item])) for item in items
        ]
        places = {unit: place for place, units in enumerate(members) for unit in units}
        inside = frozenset(places)
        boxes = [self._box(item, times) for item in items]
        entries: dict[str, int] = {}
        arrows: dict[tuple[int, int], Arrow] = {}

        def draw(source: int, target: int, spec: str) -> None:
            specs = arrows.setdefault((source, target), Arrow(source, target, [])).specs
            specs.extend([spec] if spec not in specs else [])

        for place, units in enumerate(members):
            for unit in sorted(units):
                for source in self._units.units[unit].sources:
                    spec = _spec(source.tensor)
                    if source.unit in units:
                        continue
                    if source.unit in inside:
                        if places[source.unit] < place:
                            draw(places[source.unit], place, spec)
                        else:  # of the repetition before this one
                            draw(entries.setdefault("", len(boxes) + len(entries)), place, spec)
                    elif self._enters(source, around, inside):
                        key = self._name(source) if source.unit is None else ""
                        draw(entries.setdefault(key, len(boxes) + len(entries)), place, spec)
                    else:
                        note(boxes[place].takes, self._name(source))
        boxes += [Box("input", [], key) for key in entries]
        return tidy(Level(boxes, list(arrows.values())))

    def _enters(self, source: Source, around: frozenset[int], inside: frozenset[int]) -> bool:
        if source.unit is None:
            return len(inside) == len(self._boxes) and self._name(source) in self._streams
        return source.unit in around

    def _name(self, source: Source) -> str:
        if source.unit is None:
            return self._units.input_keys[source.index]
        return self._boxes[source.unit].title

    def _box(self, item: _Item, times: int) -> Box:
        if isinstance(item, int):
            return self._boxes[item]
        units = sorted(item.members)
        first = item.items[0]
        if len(item.items) == 1 and isinstance(first, int):
            box = joined([self._boxes[i] for i in units])
            box.times = item.times
            return box
        box = Box("block", [], "", times=item.times)
        box.level = self._level(item.items, item.members, item.times * times)
        box.returns = list(dict.fromkeys(x for inner in box.level.boxes for x in inner.returns))
        box.outputs = [x for inner in box.level.boxes for x in inner.outputs]
        box.change = INSIDE if any(inner.change for inner in box.level.boxes) else ""
        return box


def _streams(units: Units) -> set[str]:
    """Returns the names of the inputs that flow through a graph and come out changed.

    They are of the shape and dtype of an output, of the same name where both have names.
    """
    made = {
        (key, x.shape, x.dtype)
        for unit in units.units
        for x in unit.outputs
        for key in units.output_keys.get(id(x), ())
    }
    names = set()
    required = []
    for x, key in zip(units.inputs, units.input_keys, strict=True):
        if is_optional_input(x):
            continue
        required.append(key)
        is_float = "float" in str(x.dtype)
        same = [name for name, shape, dtype in made if (shape, dtype) == (x.shape, x.dtype)]
        if is_float and (key in same or (same and {*same, key} & {"output", "input"})):
            names.add(key)
    return names or (set(required) if len(set(required)) == 1 else set())


def _given(unit: Unit) -> str:
    """Returns the arguments of a layer's call that are no tensors."""
    call = unit.calls[0]
    given = {key: [x for x in tree.flatten(x) if x is not None] for key, x in call.kwargs.items()}
    shown = [key for key, x in given.items() if x and not isinstance(x[0], keras.KerasTensor)]
    return ", ".join(f"{key}={call.kwargs[key]}" for key in shown)


def _spec(x: keras.KerasTensor) -> str:
    return f"({', '.join('·' if size is None else str(size) for size in x.shape)}) {x.dtype}"
