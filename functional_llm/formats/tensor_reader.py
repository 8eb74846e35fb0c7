"""What the readers of checkpoint files share: tensors read block by block, and their messages."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

Entry = TypeVar("Entry")

_STORED: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPES = {name: dtype for name, dtype in _STORED.items() if name != "float64"}
# A block and its float32 form fit the second-level cache, so conversion costs no memory traffic.
_BLOCK_ELEMENTS = 1 << 17
WHOLE = slice(None)
_DAMAGED = "The file is truncated or damaged: download it again."


def read_blocks(
    path: Path,
    name: str,
    offset: int,
    shape: tuple[int, ...],
    dtype: str,
    *,
    block: tuple[int, int],
    decode: Callable[[np.ndarray], np.ndarray],
    part: slice = WHOLE,
) -> np.ndarray:
    """Reads a stretch of a file into an array, converting a small block at a time.

    Only the result exists in full. Two threads were tried and are no faster: with blocks that fit
    the cache the interpreter's share is small and the rest is memory.

    Args:
        path: The file.
        name: Name of the tensor, for messages.
        offset: Where its bytes begin.
        shape: Its shape, already checked against the size of the file.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        block: How many elements are stored together, and in how many bytes.
        decode: Function from the bytes of whole blocks (uint8, one dimension) to their numbers.
        part: The elements to read, in the order of the file, from the beginning of a block to that
            of another.

    Returns:
        A new array of the shape and dtype. What was not read of it takes no memory.

    Raises:
        ValueError: If `dtype` is none of these or too narrow, or the file has become shorter.
    """
    target = float_dtype(dtype)
    result = np.empty(shape, target)
    flat = result.reshape(-1)
    block_elements, block_bytes = block
    first, end, _ = part.indices(flat.size)
    step = max(_BLOCK_ELEMENTS // block_elements, 1) * block_elements
    with path.open("rb") as file:
        file.seek(offset + first // block_elements * block_bytes)
        for start in range(first, end, step):
            stop = min(start + step, end)
            raw = np.fromfile(file, np.uint8, (stop - start) // block_elements * block_bytes)
            if raw.size * block_elements != (stop - start) * block_bytes:
                raise bad_file(path, f"the data of the tensor {name!r}", "the end of the file")
            _store(flat[start:stop], decode(raw), path, name)
    return result


def read_as_stored(
    path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: str, part: slice = WHOLE
) -> np.ndarray:
    """Reads a stretch of a file that holds numbers of the wanted dtype: straight into the array.

    Args:
        path: As for `read_blocks`, the others too.
        name: Name of the tensor.
        offset: Where its bytes begin.
        shape: Its shape.
        dtype: Of the file and of the array.
        part: As for `read_blocks`.

    Raises:
        ValueError: If the file has become shorter.
    """
    result = np.empty(shape, float_dtype(dtype))
    with path.open("rb", buffering=0) as file:
        left: Any = result.reshape(-1)[part].view(np.uint8)
        file.seek(offset + part.indices(result.size)[0] * result.itemsize)
        while left.size:  # the system reads 2 GB at once at most
            count = file.readinto(left)
            if not count:
                raise bad_file(path, f"the data of the tensor {name!r}", "the end of the file")
            left = left[count:]
    return result


def float_dtype(dtype: str) -> np.dtype:
    """Returns the NumPy dtype named `float32`, `float16` or `bfloat16`; others are a ValueError."""
    if dtype not in _DTYPES:
        raise ValueError(f"Expected dtype to be one of {', '.join(_DTYPES)}. Received: {dtype!r}")
    return _DTYPES[dtype]


def stored_dtype(dtype: str) -> np.dtype:
    """Returns the NumPy dtype of numbers in a file: `float64`, or one of `float_dtype`."""
    return _STORED[dtype]


def find_entry(path: Path, entries: Mapping[str, Entry], name: str) -> Entry:
    """Returns `entries[name]`; for a name that is not there, a ValueError that shows some."""
    if name not in entries:
        raise ValueError(
            f"Expected the name of a tensor of {path}: {some(entries)}. Received: {name!r}"
        )
    return entries[name]


def bad_file(path: Path, expected: str, received: str, advice: str = _DAMAGED) -> ValueError:
    """Makes the error for a file whose content is wrong."""
    return ValueError(f"Cannot read {path}: expected {expected}. Received: {received}. {advice}")


def some(names: Iterable[str], limit: int = 5) -> str:
    """Lists the first few names for a message."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest


def _store(target: np.ndarray, values: np.ndarray, path: Path, name: str) -> None:
    try:
        # Float16 ends at 65504: an infinite weight must not slip in silently.
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            if target.itemsize == 2:
                # A direct cast from bfloat16 does not report an overflow; and torch, too, rounds
                # float64 to float32 first.
                values = values.astype(np.float32, copy=False)
            target[...] = values
    except FloatingPointError:
        largest = np.nanmax(np.abs(values.astype(np.float64)))
        raise ValueError(
            f"The tensor {name!r} of {path} does not fit {target.dtype}: expected numbers within "
            f"its range. Received: {largest:.6g}. Load it in bfloat16 or float32."
        ) from None
