"""What a rewiring has changed in the shapes and dtypes of tensors, and whether that can stay so.

Keras's own formulas let much pass: a Reshape of an unknown number of rows says nothing of a wrong
width until it runs.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
from keras import tree

from functional_llm.graph.keras_private import Call
from functional_llm.graph.selection import inner_layers
from functional_llm.graph.types import Layer, Nested, Tensor


class _Change(NamedTuple):
    """What stands at `path` now returns `received`; before it was `expected`."""

    path: str
    expected: keras.KerasTensor
    received: keras.KerasTensor

    def __str__(self) -> str:
        return (
            f"What stands at '{self.path}' now returns {_words(self.received)}. Expected "
            f"{_words(self.expected)}, as before"
        )


class ShapeChanges:
    """The tensors of a new graph that differ from those in their places in the old one."""

    def __init__(self) -> None:
        self._changes: dict[int, _Change] = {}  # by the new tensor
        self._kept: list[Tensor] = []  # so that no id is used again
        self._leaving: dict[int, list[_Change | None]] = {}  # by the layer whose graph they leave

    def leave(self, layer: Layer, outputs: Iterable[Tensor]) -> None:
        """Notes with which changes the outputs of the graph inside a layer come."""
        self._leaving[id(layer)] = [self._changes.get(id(x)) for x in outputs]

    def explain(self, arguments: Nested, path: str, error: Exception) -> None:
        """Raises an error that says why a call failed, if it was for changed arguments.

        Args:
            arguments: Of the call in the new graph.
            path: Of what was called.
            error: What it raised.

        Raises:
            ValueError: If an argument has changed.
        """
        for x in tree.flatten(arguments):
            change = self._changes.get(id(x))
            if change is not None:
                raise ValueError(f"{change}: '{path}' cannot take that. {error}") from error

    def compare(
        self,
        old_call: Call,
        path: str,
        arguments: tuple[tuple[Nested, ...], dict[str, Nested]],
        outputs: list[Tensor],
        place: keras.Operation,
        is_new: bool,
    ) -> None:
        """Compares the outputs of a call with what they were.

        Args:
            old_call: The call in the old graph.
            path: Of what was called.
            arguments: Of the call in the new graph.
            outputs: Its flat outputs.
            place: What was called.
            is_new: Whether a user's layer or call is there now.

        Raises:
            ValueError: If it cannot take what has changed before it.
        """
        changed = self._changed(arguments)
        if changed is not None and not is_new:
            self._check_takes(place, arguments, path, changed)
        inside = self._leaving.get(id(old_call.operation), [])
        pairs = list(zip(old_call.outputs, outputs, strict=False))
        for i, (old, new) in enumerate(pairs):
            if not _differs(old, new):
                continue
            came = inside[i] if i < len(inside) else None
            change = _Change(path, old, new) if is_new else came or changed
            if change is not None:
                self._changes[id(new)] = change
                self._kept.append(new)
        is_hidden = not any(_differs(old, new) for old, new in pairs)
        if (
            changed is not None
            and not is_new
            and is_hidden
            and self._broadcasts(arguments, changed)
        ):
            raise ValueError(
                f"{changed}: '{path}' would broadcast that, without a word, to the shape of what "
                "it takes beside it."
            )

    def _changed(self, arguments: Nested) -> _Change | None:
        if not self._changes:
            return None
        found = (self._changes.get(id(x)) for x in tree.flatten(arguments))
        return next((change for change in found if change is not None), None)

    def _check_takes(
        self,
        place: keras.Operation,
        arguments: tuple[tuple[Nested, ...], dict[str, Nested]],
        path: str,
        changed: _Change,
    ) -> None:
        if changed.expected.dtype != changed.received.dtype:
            raise ValueError(
                f"{changed}: '{path}' reads it. Give the new layer `dtype=layer.dtype_policy`, or "
                "cast what it returns."
            )
        if inner_layers(place) is not None:
            return  # it compares its inputs itself
        args, kwargs = tree.map_structure(_with_sizes, arguments)
        try:  # really, not by the formula that Keras has for it
            keras.Operation.compute_output_spec(place, *args, **kwargs)
        except Exception as error:
            raise ValueError(f"{changed}: '{path}' cannot take that. {error}") from error

    def _broadcasts(self, arguments: Nested, changed: _Change) -> bool:
        """Whether something unchanged goes in beside what may be spread over it."""
        inputs = [x for x in tree.flatten(arguments) if isinstance(x, keras.KerasTensor)]
        before, now = changed.expected.shape, changed.received.shape
        is_one = len(before) != len(now) or any(
            b == 1 != a for a, b in zip(before, now, strict=True)
        )
        return is_one and any(id(x) not in self._changes for x in inputs)


def _with_sizes(x: Any) -> Any:
    """Returns a symbolic tensor with a number for each unknown size, which nothing divides."""
    if not isinstance(x, keras.KerasTensor):
        return x
    return keras.KerasTensor([83 if size is None else size for size in x.shape], x.dtype)


def _differs(old: Tensor, new: Any) -> bool:
    if len(old.shape) != len(new.shape) or old.dtype != new.dtype:
        return True
    return any(None not in (a, b) and a != b for a, b in zip(old.shape, new.shape, strict=True))


def _words(x: keras.KerasTensor) -> str:
    return f"a tensor of shape {tuple(x.shape)}, {x.dtype}"
