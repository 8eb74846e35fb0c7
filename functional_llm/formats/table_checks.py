"""Compares a checkpoint with a model before anything is read."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import numpy as np

from functional_llm.formats.tensor_source import TensorSource, stored_name
from functional_llm.formats.weight_table import Entry, Tensor


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
            what = f", {tensor.entry}" if tensor.entry else ""
            paths = ", ".join(tensor.paths)
            problems.append(f"missing tensor {name!r} of shape {expected}{what} (for {paths})")
        elif tuple(source.shapes[name]) != expected:
            received, stored = tuple(source.shapes[name]), stored_name(source, name)
            problems.append(f"tensor {stored!r}: expected shape {expected}, received {received}")
    entries = {without_numbers(tensor.name): tensor for tensor in tensors if tensor.entry}
    for name in sorted(set(source.shapes) - {tensor.name for tensor in tensors}):
        if not any(fnmatch(name, pattern) for pattern in ignored):
            stored = stored_name(source, name)
            what = entry_of(name, entries)
            problems.append(
                f"unknown tensor {stored!r} of shape {tuple(source.shapes[name])}{what}"
            )
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the config, {len(problems)} differences:\n  "
            + "\n  ".join(problems)
            + "\nCheck that config and weights belong together."
        )


def entry_of(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns which entry a tensor that the model does not have would be, in words, or nothing.

    Args:
        name: Its name.
        tensors: Those that hold entries, by their names without numbers.
    """
    alike = tensors.get(without_numbers(name))
    if alike is None or alike.entry is None:
        return ""
    *layer, number = map(int, _NUMBER.findall(name))
    return f", {Entry(alike.entry.kind, number, *(layer or [0]))}"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def without_numbers(name: str) -> str:
    """Returns the name of a tensor without the numbers of its layer and entry."""
    return _NUMBER.sub("", name)


def check_copies(copies: Mapping[str, str], source: TensorSource) -> None:
    """Checks that tensors which are not loaded equal those that stand for them.

    Args:
        copies: Name of a tensor that may be there -> name of the loaded tensor that it must equal.
        source: The checkpoint.

    Raises:
        ValueError: If a tensor is no copy.
    """
    for name, original in copies.items():
        if name not in source.shapes:
            continue
        if not np.array_equal(source.read(original, "float32"), source.read(name, "float32")):
            raise ValueError(
                f"The config ties {stored_name(source, name)!r} to "
                f"{stored_name(source, original)!r}: expected equal tensors, received "
                "different ones. If both belong to the model, set tie_word_embeddings to false in "
                "config.json."
            )
