"""The calls of a graph, with the loose operations between its layers joined."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import keras
from keras import tree

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.keras_private import Call, calls
from functional_llm.graph.looking.formula import formula, word
from functional_llm.graph.selection import inner_graph
from functional_llm.graph.signature import Signature
from functional_llm.graph.types import Layer

_LONGEST_NAME = 24  # characters of a formula inside another one

Groups: TypeAlias = list[int]  # the index of a call -> the call that its group is named by


@dataclass(frozen=True)
class Source:
    """Where a tensor that a unit takes comes from.

    Args:
        tensor: The tensor.
        unit: The index of the unit that makes it; `None` for an input of the graph.
        index: Which of that unit's outputs, or of the graph's inputs, it is.
    """

    tensor: keras.KerasTensor
    unit: int | None
    index: int


@dataclass(frozen=True)
class Unit:
    """The call of a layer, or calls of operations that together make one value.

    Args:
        calls: In order.
        sources: What it takes from elsewhere, in the order of the arguments.
        outputs: The tensors that others may take.
    """

    calls: Sequence[Call]
    sources: Sequence[Source]
    outputs: Sequence[keras.KerasTensor]

    @property
    def layer(self) -> Layer | None:
        """The layer that is called; `None` for operations."""
        operation = self.calls[0].operation
        return operation if isinstance(operation, keras.layers.Layer) else None


class Units:
    """The units of a graph, in an order in which they can be run, each as early as can be.

    Args:
        layer: A functional model or a built CompositeLayer.

    Attributes:
        inputs: The graph's symbolic inputs, flat.
        input_names: Their names, such as `rotation.cos`; `input_keys` are the first words of those.
        output_keys: Id of a tensor -> the first words of the names under which the graph returns
            it.
    """

    def __init__(self, layer: Layer) -> None:
        graph = inner_graph(layer)
        if isinstance(graph, keras.Sequential):
            graph = keras.Model(graph.inputs, graph.outputs)
        self.inputs = list(graph.inputs)
        self.input_names = _input_names(graph)
        self._names = {id(x): name for x, name in zip(self.inputs, self.input_names, strict=True)}
        self.input_keys = [name.partition(".")[0] for name in self.input_names]
        self.output_keys = _output_keys(layer, graph)
        self.units = self._ordered(_join(list(calls(graph)), set(self.output_keys)))
        self.consumers: list[set[int]] = [set() for _ in self.units]
        for i, unit in enumerate(self.units):
            for source in unit.sources:
                if source.unit is not None:
                    self.consumers[source.unit].add(i)

    def name_of(self, tensor: keras.KerasTensor) -> str:
        """Returns the name of an input, or of what makes a tensor."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = self._name(tensor)
        return self._names[id(tensor)]

    def _name(self, tensor: keras.KerasTensor) -> str:
        maker = next(unit for unit in self.units if any(x is tensor for x in unit.outputs))
        if maker.layer is not None:
            return maker.layer.name
        text = self.formula(maker)
        if "\n" in text or len(text) > _LONGEST_NAME:
            return next(
                word(x.operation) for x in maker.calls if any(y is tensor for y in x.outputs)
            )
        return f"({text})" if " " in text else text

    def formula(self, unit: Unit) -> str:
        """Returns the formula of a unit of operations."""
        return formula(unit.calls, self.name_of)

    def formula_without_names(self, unit: Unit) -> str:
        """Returns the formula of a unit of operations with numbers for what it takes."""
        numbers = {id(source.tensor): f"#{i}" for i, source in enumerate(unit.sources)}
        return formula(unit.calls, lambda x: numbers[id(x)])

    def formulas(self) -> Counter[str]:
        """Returns how often each formula is there."""
        return Counter(self.formula(unit) for unit in self.units if unit.layer is None)

    def taken(self) -> dict[str, set[str]]:
        """Returns the name of each layer -> the names of the inputs and layers that it reads."""
        names: dict[str, set[str]] = {}
        for unit in self.units:
            if unit.layer is not None:
                read = [x for x in unit.sources if x.unit is None or self.units[x.unit].layer]
                names.setdefault(unit.layer.name, set()).update(
                    self.name_of(x.tensor) for x in read
                )
        return names

    def _ordered(self, groups: list[list[Call]]) -> list[Unit]:
        made = [[x for call in group for x in call.outputs] for group in groups]
        makers = {id(x): i for i, tensors in enumerate(made) for x in tensors}
        indices = {id(x): k for tensors in made for k, x in enumerate(tensors)}
        needs = [
            {makers[id(x)] for call in group for x in call.inputs if id(x) in makers} - {i}
            for i, group in enumerate(groups)
        ]
        levels: dict[int, int] = {}
        while len(levels) < len(groups):  # groups are not in order: one may end after another
            for i, needed in enumerate(needs):
                if i not in levels and needed <= levels.keys():
                    levels[i] = 1 + max((levels[j] for j in needed), default=-1)
        order = sorted(levels, key=lambda i: (levels[i], i))
        places = {old: new for new, old in enumerate(order)}
        makers = {key: places[i] for key, i in makers.items()}
        indices |= {id(x): i for i, x in enumerate(self.inputs)}
        return [self._unit(groups[i], makers, indices) for i in order]

    def _unit(
        self, group: list[Call], makers: Mapping[int, int], indices: Mapping[int, int]
    ) -> Unit:
        own = {id(x) for call in group for x in call.outputs}
        sources: dict[int, Source] = {}
        for call in group:
            for x in call.inputs:
                if id(x) not in own:
                    sources.setdefault(id(x), Source(x, makers.get(id(x)), indices[id(x)]))
        taken = {id(x) for call in group for x in call.inputs}
        outputs = [x for call in group for x in call.outputs]
        if len(group) > 1:
            outputs = [x for x in outputs if id(x) not in taken or id(x) in self.output_keys]
        return Unit(group, list(sources.values()), outputs)


def _join(every: list[Call], outputs: set[int]) -> list[list[Call]]:
    """Returns the calls, those of operations that only serve one value joined."""
    users: dict[int, set[int]] = {id(x): set() for call in every for x in call.outputs}
    for i, call in enumerate(every):
        for x in call.inputs:
            if id(x) in users:
                users[id(x)].add(i)
    used_by = [{j for x in call.outputs for j in users[id(x)]} for call in every]
    loose = [
        not isinstance(call.operation, keras.layers.Layer)
        and not any(id(x) in outputs for x in call.outputs)
        for call in every
    ]
    operations = [not isinstance(call.operation, keras.layers.Layer) for call in every]
    groups = list(range(len(every)))
    for i in reversed(groups):
        into = {groups[j] for j in used_by[i]}
        if loose[i] and len(into) == 1 and all(operations[j] for j in used_by[i]):
            groups[i] = into.pop()
    _join_twins(groups, used_by, loose, operations)
    members: dict[int, list[Call]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(every[i])
    return list(members.values())


def _join_twins(
    groups: Groups, used_by: list[set[int]], loose: list[bool], operations: list[bool]
) -> None:
    """Joins values that are made of a common one for the same users, as a cosine and a sine."""
    for i in reversed(range(len(groups))):
        into = {groups[j] for j in used_by[i]} - {groups[i]}
        if not loose[i] or len(into) < 2 or not all(operations[j] for j in into):
            continue
        ends = [
            {groups[j] for k in range(len(groups)) if groups[k] == g for j in used_by[k]} - {g}
            for g in into
        ]
        if ends[0] and all(x == ends[0] for x in ends):
            last = max(into)
            joined = into | {groups[i]}
            for k in range(len(groups)):
                if groups[k] in joined:
                    groups[k] = last


def _input_names(graph: keras.Model) -> list[str]:
    """Returns names that say where in the structure each input stands."""
    names = []
    for path, x in tree.flatten_with_path(graph.input):
        words = [str(key) for key in path]
        if not words or words[0].isdigit():  # composites: the structure is in the name
            words = x.name.removeprefix("input.").split(".")
        is_nameless = words[0].isdigit() or words[0].startswith("keras_tensor")
        names.append("input" if is_nameless else ".".join(words))
    if len(names) > 1:
        return [f"input {i}" if name == "input" else name for i, name in enumerate(names, 1)]
    return names


def _output_keys(layer: Layer, graph: keras.Model) -> dict[int, list[str]]:
    tensors = tree.flatten(graph.output)
    structure = graph.output
    config = layer.get_build_config() if isinstance(layer, CompositeLayer) else None
    if config is not None:
        structure = Signature.from_config(config).outputs
    keys: dict[int, list[str]] = {}
    for (path, _), x in zip(tree.flatten_with_path(structure), tensors, strict=True):
        key = str(path[0]) if path and isinstance(path[0], str) else "output"
        if key not in keys.setdefault(id(x), []):
            keys[id(x)].append(key)
    return keys
