"""What a rewiring changed: one model beside another."""

from dataclasses import dataclass, field

from functional_llm.graph.looking.facts import Weight, config_of, key_of, weights_of
from functional_llm.graph.looking.units import Units
from functional_llm.graph.selection import check_graph, inner_layers, walk
from functional_llm.graph.types import Layer

ADDED, CHANGED, INSIDE = "added", "changed", "inside"


@dataclass
class Changes:
    """What is other in a model than in the one beside it.

    Attributes:
        kinds: Path of a layer -> `"added"`, `"changed"`, or `"inside"` for one that only has
            something inside that is.
        lines: Path of a layer -> what is other in it, a sentence each.
        removed: Path of a layer with a graph, empty for the model -> the names of the layers and
            the formulas that only the other one has there.
        formulas: Path of a layer with a graph -> formulas in it that the other one has not.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    removed: dict[str, list[str]] = field(default_factory=dict)
    formulas: dict[str, list[str]] = field(default_factory=dict)


def find_changes(model: Layer, beside: Layer | None) -> Changes:
    """Returns what is other in a model than in another one.

    Layers are compared by their paths; a layer at a path that the other model has not is found
    again by the weights that both share. In models that share none, weights are compared by their
    shapes and dtypes.

    Args:
        model: A functional model or a built CompositeLayer.
        beside: Another one, usually that which `model` was rewired from; `None` for none.

    Raises:
        TypeError: If one of them has no graph.
        ValueError: If one of them has none yet.
    """
    check_graph(model)
    if beside is None:
        return Changes()
    return _Comparison(model, beside).run()


class _Comparison:
    def __init__(self, model: Layer, beside: Layer) -> None:
        self._now = dict(walk(model, composites=True))
        self._before = dict(walk(beside, composites=True))
        self._models = model, beside
        known = {id(v) for v in beside.variables}
        self._shares = any(id(v) in known for v in model.variables)
        self._owners: dict[int, str] = {}
        for path, layer in self._before.items():
            if inner_layers(layer) is None:
                self._owners |= {id(v): path for v in layer.variables}
        self._training = {id(v) for v in model.trainable_variables}
        self._changes = Changes()

    def run(self) -> Changes:
        for path, layer in self._now.items():
            self._compare(path, layer)
        for path in self._before:
            parent, _, name = path.rpartition("/")
            if path not in self._now and self._has_graph(parent):
                self._changes.removed.setdefault(parent, []).append(name)
        for path in ["", *self._now]:
            if self._has_graph(path):
                self._compare_calls(path)
        for path in [*self._changes.kinds, *self._changes.removed, *self._changes.formulas]:
            ends = [i for i, letter in enumerate(path) if letter == "/"]
            for end in [*ends, *([len(path)] if path else [])]:
                self._changes.kinds.setdefault(path[:end], INSIDE)
        return self._changes

    def _has_graph(self, path: str) -> bool:
        pair = (self._now.get(path), self._before.get(path)) if path else self._models
        return all(layer is not None and inner_layers(layer) is not None for layer in pair)

    def _compare(self, path: str, layer: Layer) -> None:
        old = self._before.get(path)
        is_graph = inner_layers(layer) is not None
        if old is None:
            self._changes.kinds[path] = ADDED
            owners = [self._owners[id(v)] for v in layer.variables if id(v) in self._owners]
            if owners and not is_graph:
                self._changes.lines[path] = [
                    f"has the weights of {', '.join(dict.fromkeys(owners))}"
                ]
            return
        lines = [f"{_name(old)} → {_name(layer)}"] if type(old) is not type(layer) else []
        if is_graph and inner_layers(old) is not None:
            if lines:
                self._changes.kinds[path] = CHANGED
                self._changes.lines[path] = lines
            return
        lines += self._weights(layer, old)
        if type(old) is type(layer) and key_of(old) != key_of(layer):
            lines += _config_lines(config_of(old), config_of(layer))
        if lines:
            self._changes.kinds[path] = CHANGED
            self._changes.lines[path] = lines

    def _weights(self, layer: Layer, old: Layer) -> list[str]:
        now, before = weights_of(layer, self._training), weights_of(old, ())
        if not self._shares:
            return [] if _plain(now) == _plain(before) else _weight_lines(now, before)
        ids, old_ids = {id(v) for v in layer.weights}, {id(v) for v in old.weights}
        added = [w for w, v in zip(now, _unique(layer), strict=True) if id(v) not in old_ids]
        gone = [w for w, v in zip(before, _unique(old), strict=True) if id(v) not in ids]
        if added and _plain(added) == _plain(gone):
            return [f"other values: {', '.join(w.name for w in added)}"]
        return _weight_lines(added, gone)

    def _compare_calls(self, path: str) -> None:
        pair = (self._now[path], self._before[path]) if path else self._models
        units, old_units = (Units(layer) for layer in pair)
        now, before = units.formulas(), old_units.formulas()
        self._compare_connections(path, units.taken(), old_units.taken())
        if added := list((now - before).elements()):
            self._changes.formulas[path] = added
        if gone := list((before - now).elements()):
            self._changes.removed.setdefault(path, []).extend(gone)

    def _compare_connections(
        self, path: str, now: dict[str, set[str]], before: dict[str, set[str]]
    ) -> None:
        """Notes layers that read other layers and inputs than before, of those that both have."""
        there = now.keys() & before.keys()
        known = set().union(*now.values()) & set().union(*before.values()) | there
        for name in there:
            new, gone = (now[name] - before[name]) & known, before[name] - now[name]
            if new and gone:
                inner = f"{path}/{name}" if path else name
                self._changes.kinds[inner] = CHANGED
                words = [", ".join(sorted(x)) for x in (new, gone)]
                lines = self._changes.lines.setdefault(inner, [])
                lines.append(f"takes {words[0]}, not {words[1]}")


def _name(layer: Layer) -> str:
    return type(layer).__name__


def _unique(layer: Layer) -> list[object]:
    return list({id(v): v for v in layer.weights}.values())


def _plain(weights: list[Weight]) -> list[tuple[object, ...]]:
    return [(w.name, w.shape, w.dtype) for w in weights]


def _weight_lines(added: list[Weight], gone: list[Weight]) -> list[str]:
    return [f"+ {w}" for w in added] + [f"- {w}" for w in gone]


def _config_lines(before: dict[str, object], now: dict[str, object]) -> list[str]:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key)} → {now.get(key)}" for key in keys]
