"""Weight tables: tensors of a file to variables of a model and back, strict both ways.

A row is (tensor name, variable path, transform); `{}` in both names stands for the number of the
layer. A table may hold rows for parts that a config leaves out, such as a bias: a row whose
variable the model lacks does not count, so that its tensor in a file is an unknown one. Rows that
name the same tensor are its parts, in order, along the axis that their transform names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import keras
import numpy as np

from functional_llm.backbones.transforms import TRANSFORMS, Row, Transform


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the variables that it holds the values of.

    Args:
        name: Its name in the checkpoint.
        paths: Of the variables: one, or the parts of a fused tensor in order.
        transform: Of each part.
    """

    name: str
    paths: tuple[str, ...]
    transform: Transform

    def split(self, array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns the values of the variables; `sizes` are those of the parts on the axis."""
        return self.transform.split(array, sizes)

    def join(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the tensor of the variables' values."""
        return self.transform.join(arrays)

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Returns how long each part is on the axis, from the shapes of the variables."""
        axis = self.transform.axis
        return [0 if axis is None else self._part(shapes[path])[axis] for path in self.paths]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of the tensor, from the shapes of the variables."""
        shape = list(self._part(shapes[self.paths[0]]))
        if self.transform.axis is not None:
            shape[self.transform.axis] = sum(self.sizes(shapes))
        return tuple(shape)

    def _part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        # A view of a single number has the shape without the memory.
        return self.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape


HEAD = "lm_head.weight"  # what all families call a head that is not the embedding


def tied_head(tensors: Sequence[Tensor]) -> tuple[str, str]:
    """Returns the name of the head's tensor, and of the embedding's which the head is, too."""
    return HEAD, next(x.name for x in tensors if x.paths == ("token_embedding/embeddings",))


def expand_table(
    table: Sequence[Row], paths: Sequence[str], num_layers: int, strict: bool = True
) -> list[Tensor]:
    """Returns the tensors of a checkpoint, with layers filled in, for the variables that exist.

    Raises:
        ValueError: If a variable has no row, unless `strict` is false.
    """
    present = set(paths)
    targets: dict[str, list[str]] = {}
    transforms: dict[str, Transform] = {}
    for source, target, transform in table:
        for index in range(num_layers if "{}" in target else 1):
            path, name = target.format(index), source.format(index)
            if path in present:
                targets.setdefault(name, []).append(path)
                transforms[name] = (
                    TRANSFORMS[transform] if isinstance(transform, str) else transform
                )
    missing = sorted(present - {path for paths in targets.values() for path in paths})
    if missing and strict:
        raise ValueError(f"The checkpoint table has no row for the variables {missing}.")
    return [Tensor(name, tuple(paths), transforms[name]) for name, paths in targets.items()]


def module_names(table: Sequence[Row], num_layers: int) -> dict[str, str]:
    """Returns the path of each layer with a matrix -> the name of its module in checkpoints."""
    return {
        target.rpartition("/")[0].format(index): source.removesuffix(".weight").format(index)
        for source, target, *_ in table
        if target.endswith(("/kernel", "/embeddings")) and source.endswith(".weight")
        for index in range(num_layers if "{}" in target else 1)
    }


def check_source(
    tensors: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    ignored: Sequence[str] = (),
) -> None:
    """Compares a checkpoint with a model before anything is read.

    Args:
        tensors: From `expand_table`.
        shapes: Variable path -> shape.
        source: The checkpoint.
        ignored: Patterns of tensor names that may be there and are not used.

    Raises:
        ValueError: Naming every missing tensor, every unknown one and every wrong shape.
    """
    problems = []
    for tensor in tensors:
        expected, name = tensor.shape(shapes), tensor.name
        if name not in source.shapes:
            problems.append(
                f"missing tensor {name!r} of shape {expected} (for {', '.join(tensor.paths)})"
            )
        elif tuple(source.shapes[name]) != expected:
            received, stored = tuple(source.shapes[name]), stored_name(source, name)
            problems.append(f"tensor {stored!r}: expected shape {expected}, received {received}")
    for name in sorted(set(source.shapes) - {tensor.name for tensor in tensors}):
        if not any(fnmatch(name, pattern) for pattern in ignored):
            stored = stored_name(source, name)
            problems.append(f"unknown tensor {stored!r} of shape {tuple(source.shapes[name])}")
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the config, {len(problems)} differences:\n  "
            + "\n  ".join(problems)
            + "\nCheck that config and weights belong together."
        )


def check_copies(
    copies: Mapping[str, str],
    variables: Sequence[keras.Variable],
    tensors: Sequence[Tensor],
    source: TensorSource,
) -> None:
    """Checks that tensors which are not loaded equal the variables that stand for them.

    Args:
        copies: Name of a tensor that may be there -> name of the loaded tensor that it must equal.
        variables: All variables of the model, loaded.
        tensors: From `expand_table`.
        source: The checkpoint.

    Raises:
        ValueError: If a tensor is no copy.
    """
    by_path = {variable.path: variable for variable in variables}
    by_name = {tensor.name: by_path[tensor.paths[0]] for tensor in tensors}
    for name, original in copies.items():
        if name not in source.shapes:
            continue
        variable = by_name[original]
        expected = keras.ops.convert_to_numpy(variable.value)
        if not np.array_equal(expected, source.read(name, variable.dtype)):
            raise ValueError(
                f"The config ties {stored_name(source, name)!r} to "
                f"{stored_name(source, original)!r}: expected equal tensors, received "
                "different ones. If both belong to the model, set tie_word_embeddings to false in "
                "config.json."
            )


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


def load_weights(
    variables: Sequence[keras.Variable],
    tensors: Sequence[Tensor],
    source: TensorSource,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> None:
    """Streams a checkpoint into variables, each tensor straight into the variable's dtype.

    Args:
        variables: All variables of the model.
        tensors: From `expand_table`, checked by `check_source`.
        source: The checkpoint.
        progress: Wraps the iterator over the tensors, given their number, to show progress.
    """
    by_path = {variable.path: variable for variable in variables}
    shapes = {path: tuple(variable.shape) for path, variable in by_path.items()}

    def read(tensor: Tensor) -> tuple[Tensor, list[np.ndarray]]:
        array = source.read(tensor.name, by_path[tensor.paths[0]].dtype)
        return tensor, tensor.split(array, tensor.sizes(shapes))

    with ThreadPoolExecutor(max_workers=1) as reader:  # reads one ahead of the assignment
        for tensor, arrays in progress(_one_ahead(reader, read, tensors), len(tensors)):
            for path, array in zip(tensor.paths, arrays, strict=True):
                by_path[path].assign(array)


def _one_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[Any]:
    iterator = iter(items)
    pending = [pool.submit(function, item) for item in islice(iterator, 1)]
    for item in iterator:
        following = pool.submit(function, item)
        yield pending.pop().result()
        pending.append(following)
    for last in pending:
        yield last.result()


def export_weights(
    variables: Sequence[keras.Variable], tensors: Sequence[Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, array in the checkpoint's layout): the table the other way round."""
    by_path = {variable.path: variable for variable in variables}
    for tensor in tensors:
        values = [keras.ops.convert_to_numpy(by_path[path].value) for path in tensor.paths]
        yield tensor.name, tensor.join(values)
