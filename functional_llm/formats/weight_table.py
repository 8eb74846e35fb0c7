"""Weight tables: tensors of a file to variables of a model and back, strict both ways.

A row is (tensor name, variable path, transform); `{}` in both names stands for the number of the
layer. A table may hold rows for parts that a config leaves out, such as a bias: a row whose
variable the model lacks does not count, so that its tensor in a file is an unknown one. Rows that
name the same tensor are its parts, in order, along the axis that their transform names.

A variable may lie in a file as many tensors, one for each entry of its first axis: an expert's or a
head's. The row names them once, with their number, what they are, and all that is there for the
number's sake in brackets: `experts[.{expert}].up_proj.weight` is `experts.0.up_proj.weight` and so
on. Without the brackets it is the name that files give which hold the variable as one tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Any, Protocol

import keras
import numpy as np

from functional_llm.backbones.transforms import TRANSFORMS, Row, Transform
from functional_llm.formats.grid import SIZE, Grid
from functional_llm.formats.tensor_reader import float_dtype
from functional_llm.formats.tensor_source import TensorSource, read_grid, read_rows
from functional_llm.graph.placing import assign, own_boxes, to_numpy

_NUMBERED = re.compile(r"\[(.*?)\{(\w+)\}(.*?)\]")  # in the names of rows


def in_one_tensor(name: str) -> str:
    """Returns the name of a row in files that hold the variable as one tensor."""
    return _NUMBERED.sub("", name)


@dataclass(frozen=True)
class Entry:
    """The entry on the first axis of its variables that a tensor holds.

    Args:
        kind: What the entries are, in a word.
        number: Of the entry.
        layer: Number of the layer.
    """

    kind: str
    number: int
    layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of layer {self.layer}"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the variables that it holds the values of.

    Args:
        name: Its name in the checkpoint.
        paths: Of the variables: one, or the parts of a fused tensor in order.
        transform: Of each part.
        entry: Which entry of the variables it holds; `None` for all of them.
    """

    name: str
    paths: tuple[str, ...]
    transform: Transform
    entry: Entry | None = None

    def split(self, array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns the values of the variables, or of their entries.

        Args:
            array: The tensor.
            sizes: Those of the parts on the axis.
        """
        return self.transform.split(array, sizes)

    def split_grid(self, grid: Grid, sizes: Sequence[int]) -> list[Grid]:
        """Returns the same of a tensor that is a grid: each of its arrays is split alike."""
        arrays = (grid.integers, grid.scale, grid.offset)
        return list(starmap(Grid, zip(*(self.split(x, sizes) for x in arrays), strict=True)))

    def join(self, values: Iterable[Any]) -> np.ndarray:
        """Returns the tensor of the variables' values, whole ones, on any device."""
        own = (x if self.entry is None else x[self.entry.number] for x in values)
        return self.transform.join(map(to_numpy, own))

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
        shape = shape if self.entry is None else shape[1:]
        # A view of a single number has the shape without the memory.
        return self.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape


HEAD = "lm_head.weight"  # what all families call a head that is not the embedding


class Target(Protocol):
    """What a tensor is loaded into: a variable, or what makes something else of the values."""

    @property
    def path(self) -> str:
        """The path of the variable."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""

    @property
    def dtype(self) -> str:
        """The dtype to read them in."""

    def assign(self, value: Any) -> object:
        """Takes the values: an array, or a `Grid` if it has `takes_grids`."""


def shapes_of(variables: Iterable[Target]) -> dict[str, tuple[int, ...]]:
    """Returns variable path -> shape."""
    return {variable.path: tuple(variable.shape) for variable in variables}


def tied_head(tensors: Sequence[Tensor]) -> tuple[str, str]:
    """Returns the name of the head's tensor, and of the embedding's which the head is, too."""
    return HEAD, next(x.name for x in tensors if x.paths == ("token_embedding/embeddings",))


def expand_table(
    table: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    num_layers: int,
    strict: bool = True,
) -> list[Tensor]:
    """Returns the tensors of a checkpoint, with layers filled in, for the variables that exist.

    Args:
        table: Its rows.
        shapes: Variable path -> shape.
        num_layers: How many layers there are.
        strict: Whether each variable must have a row.

    Raises:
        ValueError: If a variable has no row, unless `strict` is false.
    """
    found: dict[str, Tensor] = {}
    for source, target, transform in table:
        change = TRANSFORMS[transform] if isinstance(transform, str) else transform
        for layer in range(num_layers if "{}" in target else 1):
            path = target.format(layer)
            if path not in shapes:
                continue
            for name, entry in _tensors_of(source, layer, shapes[path]):
                paths = found[name].paths if name in found else ()
                found[name] = Tensor(name, (*paths, path), change, entry)
    missing = sorted(set(shapes) - {path for tensor in found.values() for path in tensor.paths})
    if missing and strict:
        raise ValueError(f"The checkpoint table has no row for the variables {missing}.")
    return list(found.values())


def _tensors_of(
    source: str, layer: int, shape: tuple[int, ...]
) -> Iterator[tuple[str, Entry | None]]:
    """Yields the names of the tensors that hold a variable."""
    match = _NUMBERED.search(source)
    if match is None:
        yield source.format(layer), None
        return
    before, kind, after = match.groups()
    for number in range(shape[0]):
        name = f"{source[: match.start()]}{before}{number}{after}{source[match.end() :]}"
        yield name.format(layer), Entry(kind, number, layer)


def matrix_paths(table: Sequence[Row], num_layers: int) -> list[str]:
    """Returns the paths of the layers with a matrix, those of experts, too."""
    targets = [target for _, target, *_ in table if target.endswith(("/kernel", "/embeddings"))]
    paths = (
        target.rpartition("/")[0].format(index)
        for target in targets
        for index in range(num_layers if "{}" in target else 1)
    )
    return list(dict.fromkeys(paths))


def module_names(table: Sequence[Row], num_layers: int) -> dict[str, str]:
    """Returns the path of each layer with a matrix -> the name of its module in checkpoints.

    A layer whose matrices are those of many modules has none.
    """
    return {
        target.rpartition("/")[0].format(index): source.removesuffix(".weight").format(index)
        for source, target, *_ in table
        if target.endswith(("/kernel", "/embeddings"))
        and source.endswith(".weight")
        and not _NUMBERED.search(source)
        for index in range(num_layers if "{}" in target else 1)
    }


def load_weights(
    variables: Sequence[Target],
    tensors: Sequence[Tensor],
    source: TensorSource,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> None:
    """Streams a checkpoint into variables, each tensor straight into the variable's dtype.

    With a distribution, only those rows of a tensor are read that this process needs.

    Args:
        variables: All variables of the model.
        tensors: From `expand_table`, checked by `check_source`.
        source: The checkpoint.
        progress: Wraps the iterator over the tensors, given their number, to show progress.
    """
    by_path = {variable.path: variable for variable in variables}
    shapes = shapes_of(variables)

    def read(tensor: Tensor) -> tuple[Tensor, Sequence[Any]]:
        if grids := _read_grids(tensor, by_path, shapes, source):
            return tensor, grids
        dtype = by_path[tensor.paths[0]].dtype
        if not tensor.transform.computes:
            rows = _own_rows(tensor, by_path, shapes)
            if rows is None:
                array = source.read(tensor.name, dtype)
            else:
                array = read_rows(source, tensor.name, dtype, rows)
            # `assign` puts them in order on their way to the device.
            return tensor, tensor.transform.views(array, tensor.sizes(shapes))
        parts = tensor.split(source.read(tensor.name, "float32"), tensor.sizes(shapes))
        return tensor, [part.astype(float_dtype(dtype)) for part in parts]

    assembly = Assembly(shapes)
    with ThreadPoolExecutor(max_workers=1) as reader:  # reads one ahead of the assignment
        for tensor, arrays in progress(_one_ahead(reader, read, tensors), len(tensors)):
            for path, array in assembly.add(tensor, arrays):
                target = by_path[path]
                if isinstance(target, keras.Variable):
                    assign(target, array)
                else:
                    target.assign(array)


def _own_rows(
    tensor: Tensor, targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]
) -> slice | None:
    """Returns the rows of a tensor that devices of this process need; `None` for all."""
    shape = tensor.shape(shapes)
    if keras.distribution.distribution() is None or not shape:
        return None
    # Each number of the tensor says in which row it is; the transform takes it where it goes.
    marks = np.arange(shape[0], dtype="int32").reshape(-1, *(1 for _ in shape[1:]))
    views = tensor.transform.views(np.broadcast_to(marks, shape), tensor.sizes(shapes))
    needed: list[int] = []
    for path, view in zip(tensor.paths, views, strict=True):
        variable = targets[path]
        boxes = own_boxes(variable) if isinstance(variable, keras.Variable) else None
        if boxes is None:
            return None
        for box in boxes:
            if tensor.entry is not None:
                if tensor.entry.number not in range(shapes[path][0])[box[0]]:
                    continue
                box = box[1:]
            rows = view[box]
            needed += [int(rows.min()), int(rows.max()) + 1]
    return slice(min(needed, default=0), max(needed, default=0))


def _read_grids(
    tensor: Tensor,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
) -> Sequence[Grid]:
    """Returns the values of the variables as grids, if they lie in the file as such and fit."""
    takers = [getattr(targets[path], "takes_grids", False) for path in tensor.paths]
    if not all(takers) or tensor.transform.computes or tensor.entry is not None:
        return []
    if (grid := read_grid(source, tensor.name)) is None:
        return []
    grids = tensor.split_grid(grid, tensor.sizes(shapes))
    return grids if all(grid.is_grouped(SIZE) for grid in grids) else []


class Assembly:
    """Puts the entries of variables together, one buffer for each variable that is begun.

    Args:
        shapes: Variable path -> shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._begun: dict[str, np.ndarray] = {}
        self._missing: dict[str, set[int]] = {}

    def add(self, tensor: Tensor, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields path and value of each variable that is complete with this tensor.

        Args:
            tensor: The tensor.
            arrays: Its values for the variables, in any order in memory.
        """
        for path, array in zip(tensor.paths, arrays, strict=True):
            if tensor.entry is None:
                yield path, array
                continue
            if path not in self._begun:
                self._begun[path] = _empty_like(array, self._shapes[path][0])
                self._missing[path] = set(range(self._shapes[path][0]))
            self._begun[path][tensor.entry.number] = array
            self._missing[path].discard(tensor.entry.number)
            if not self._missing[path]:
                yield path, self._begun.pop(path)


def _empty_like(array: np.ndarray, number: int) -> np.ndarray:
    """Returns room for a number of such arrays, each with its axes in memory as this one's."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    room = np.empty((number, *(array.shape[axis] for axis in order)), array.dtype)
    return room.transpose(0, *(1 + np.argsort(order)))


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
        yield tensor.name, tensor.join(by_path[path].value for path in tensor.paths)
