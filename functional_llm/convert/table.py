"""Checkpoint tables: tensors of a file <-> variables of a model, strict both ways.

A row is (tensor name, variable path, transform name); `{}` in both names stands for the layer. A
table may hold rows for parts that a config leaves out (a bias, an untied head): rows whose
variable the model lacks do not count, so a tensor they name is then one too many.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from typing import Any, Protocol

import keras
import numpy as np
from keras.src.backend.common import global_state

Row = tuple[str, str, str]


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, on arrays."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


TRANSFORMS = {
    "same": Transform(lambda a: a, lambda a: a),
    "transpose": Transform(np.transpose, np.transpose),
}


@contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, variables are made without values: whoever makes them must assign every one.

    Spares a load the random initialisation, and the memory for it.
    """
    with keras.StatelessScope(initialize_variables=False):
        yield
    # Keras (private) remembers such variables, to initialise them when a later scope ends.
    global_state.set_global_attribute("uninitialized_variables", [])


def expand_table(table: Sequence[Row], paths: Sequence[str], num_layers: int) -> dict[str, Row]:
    """Returns variable path -> row, with layers filled in, for the variables that exist.

    Raises:
        ValueError: If a variable has no row.
    """
    present = set(paths)
    rows: dict[str, Row] = {}
    for source, target, transform in table:
        for index in range(num_layers if "{}" in target else 1):
            path = target.format(index)
            if path in present:
                rows[path] = (source.format(index), path, transform)
    missing = sorted(present - set(rows))
    if missing:
        raise ValueError(f"The checkpoint table has no row for the variables {missing}.")
    return rows


def module_names(table: Sequence[Row], num_layers: int) -> dict[str, str]:
    """Returns layer path -> name of the module of the checkpoint, for the matrix products.

    Both are what is left of a row's names without `.weight` and `/kernel`.
    """
    return {
        target.removesuffix("/kernel").format(index): source.removesuffix(".weight").format(index)
        for source, target, *_ in table
        if target.endswith("/kernel") and source.endswith(".weight")
        for index in range(num_layers if "{}" in target else 1)
    }


def check_source(
    rows: Mapping[str, Row],
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    ignored: Sequence[str] = (),
) -> None:
    """Compares a checkpoint with a model before anything is read.

    Args:
        rows: From `expand_table`.
        shapes: Variable path -> shape.
        source: The checkpoint.
        ignored: Patterns of tensor names that may be there and are not used.

    Raises:
        ValueError: Naming every missing tensor, every unknown one and every wrong shape.
    """
    problems = []
    for path, (name, _, transform) in rows.items():
        if name not in source.shapes:
            problems.append(f"missing tensor {name!r} (for {path}, shape {shapes[path]})")
            continue
        # A view of a single number has the shape without the memory.
        received = np.broadcast_to(np.float32(0), source.shapes[name])
        expected = TRANSFORMS[transform].inverse(np.broadcast_to(np.float32(0), shapes[path])).shape
        if received.shape != expected:
            problems.append(
                f"tensor {name!r}: expected shape {expected}, received {received.shape}"
            )
    used = {name for name, _, _ in rows.values()}
    for name in sorted(set(source.shapes) - used):
        if not any(fnmatch(name, pattern) for pattern in ignored):
            problems.append(f"unknown tensor {name!r} of shape {tuple(source.shapes[name])}")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"The checkpoint does not fit the config, {len(problems)} differences:\n"
            f"  {shown}{more}\nCheck that config and weights belong together."
        )


def load_weights(
    variables: Sequence[keras.Variable],
    rows: Mapping[str, Row],
    source: TensorSource,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items,
) -> None:
    """Streams a checkpoint into variables, each tensor straight into the variable's dtype.

    Args:
        variables: All variables of the model.
        rows: From `expand_table`, checked by `check_source`.
        source: The checkpoint.
        progress: Wraps the iterator over the tensors, given their number, to show progress.
    """

    def read(variable: keras.Variable) -> tuple[keras.Variable, np.ndarray]:
        name, _, transform = rows[variable.path]
        array = TRANSFORMS[transform].forward(source.read(name, variable.dtype))
        return variable, np.ascontiguousarray(array)

    with ThreadPoolExecutor(max_workers=1) as reader:  # reads one ahead of the assignment
        for variable, array in progress(_one_ahead(reader, read, variables), len(variables)):
            variable.assign(array)


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
    variables: Sequence[keras.Variable], rows: Mapping[str, Row]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, array in the checkpoint's layout): the table the other way round."""
    for variable in variables:
        name, _, transform = rows[variable.path]
        array = keras.ops.convert_to_numpy(variable.value)
        yield name, np.ascontiguousarray(TRANSFORMS[transform].inverse(array))
