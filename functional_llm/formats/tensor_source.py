"""Named tensors to read one at a time, and the same under other names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from functional_llm.formats.grid import Grid, HasGrids


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""


@runtime_checkable
class HasRows(Protocol):
    """A checkpoint of whose tensors some rows can be read."""

    def read_rows(self, name: str, dtype: str, rows: slice) -> np.ndarray:
        """Returns one tensor in a dtype, with any values beside these rows of its first axis."""


@dataclass(frozen=True)
class _Renamed:
    """A checkpoint under other names."""

    source: TensorSource
    names: Mapping[str, str]  # name here -> name there

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.source.shapes[theirs] for name, theirs in self.names.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        return self.source.read(self.names[name], dtype)

    def read_rows(self, name: str, dtype: str, rows: slice) -> np.ndarray:
        return read_rows(self.source, self.names[name], dtype, rows)

    def read_grid(self, name: str) -> Grid | None:
        return (
            self.source.read_grid(self.names[name]) if isinstance(self.source, HasGrids) else None
        )


def read_rows(source: TensorSource, name: str, dtype: str, rows: slice) -> np.ndarray:
    """Returns a tensor of which these rows of the first axis are needed.

    The others have any values.
    """
    return (
        source.read_rows(name, dtype, rows)
        if isinstance(source, HasRows)
        else source.read(name, dtype)
    )


def read_grid(source: TensorSource, name: str) -> Grid | None:
    """Returns a tensor as the 4-bit integers of its file; `None` if it does not hold such."""
    return source.read_grid(name) if isinstance(source, HasGrids) else None


def stored_name(source: TensorSource, name: str) -> str:
    """Returns what a tensor is called in the file, for messages."""
    if isinstance(source, _Renamed):
        return stored_name(source.source, source.names.get(name, name))
    return name


def with_prefix(source: TensorSource, prefix: str, names: Iterable[str]) -> TensorSource:
    """Returns a checkpoint under the names that the model needs.

    Each name may lack the prefix, as in checkpoints of a bare model without its head, or have it
    though it should not: the rule of Transformers.

    Args:
        source: The checkpoint.
        prefix: Of the names of the bare model's tensors.
        names: The names that the model needs.

    Raises:
        ValueError: If two tensors stand for the same one.
    """
    needed = set(names)

    def rename(name: str) -> str:
        if name.startswith(prefix) and name.removeprefix(prefix) in needed:
            return name.removeprefix(prefix)
        return f"{prefix}{name}" if f"{prefix}{name}" in needed else name

    return with_names(source, rename)


def with_names(source: TensorSource, rename: Callable[[str], str]) -> TensorSource:
    """Returns a checkpoint under other names.

    Args:
        source: The checkpoint.
        rename: Name in the checkpoint -> new name.

    Raises:
        ValueError: If two tensors get the same name.
    """
    renamed: dict[str, str] = {}
    for name in source.shapes:
        other = renamed.setdefault(rename(name), name)
        if other != name:
            raise ValueError(
                f"Expected one tensor {rename(name)!r} in the checkpoint. Received two: {other!r} "
                f"and {name!r}. Remove one of them."
            )
    return _Renamed(source, renamed)


def with_originals(source: TensorSource, copies: Mapping[str, str]) -> TensorSource:
    """Returns a checkpoint in which a tensor stands for the one that it is tied to.

    Args:
        source: The checkpoint.
        copies: Name of a tensor -> name of the loaded tensor that it must equal; the file may hold
            either.
    """
    shapes = source.shapes
    swapped = {name: x for name, x in copies.items() if name in shapes and x not in shapes}
    return _Renamed(source, {swapped.get(name, name): name for name in shapes})
