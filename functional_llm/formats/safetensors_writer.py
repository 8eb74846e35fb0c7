"""Writes the weights of a directory in Hugging Face layout, in shards."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from functional_llm.files.json_files import write_json
from functional_llm.files.processes import is_first
from functional_llm.files.replacing import share
from functional_llm.formats.safetensors_reader import INDEX_NAME

WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", INDEX_NAME)


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors as `model.safetensors`, or as shards with an index.

    Args:
        folder: Where to write.
        tensors: Names and arrays; no more than one shard of them is in memory at a time.
        max_shard_bytes: Largest size of a file. A tensor larger than that gets a file of its own.
    """
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        _write_shard(path, shard)
        shards.append((path, list(shard)))
        shard.clear()

    for name, array in tensors:
        if shard and size + array.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        os.replace(shards[0][0], folder / "model.safetensors")
        return
    placed = {}
    for i, (path, names) in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        os.replace(path, folder / file)
        placed.update(dict.fromkeys(names, file))
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": placed})


def write_one_by_one(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, with no more than one tensor in memory.

    Of several processes the first one writes; the others only take the tensors, which may be
    something that all must do.

    Args:
        path: The file.
        shapes: Shape and dtype of each tensor, by name.
        tensors: The tensors, in this order.
        metadata: Texts to keep beside.

    Raises:
        OSError: If it cannot be written.
    """
    if not is_first():
        for _ in tensors:
            pass
        return
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _stored(np.dtype(dtype)),
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _stored(dtype: np.dtype[Any]) -> str:
    """Returns what safetensors calls a dtype."""
    if dtype.kind == "b":
        return "BOOL"
    if dtype == ml_dtypes.bfloat16:
        return "BF16"
    return f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def read_dtype(stored: str) -> np.dtype[Any]:
    """Returns the dtype that safetensors calls so, of those that `write_one_by_one` writes."""
    if stored in ("BOOL", "BF16"):
        return np.dtype(bool if stored == "BOOL" else ml_dtypes.bfloat16)
    return np.dtype(f"{stored[0].lower()}{int(stored[1:]) // 8}")


def _write_shard(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    if not is_first():
        return path.touch()
    # Not `safetensors.numpy.save_file`, which copies every array. The arrays outlive the call.
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(x.dtype), shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes
        )
        for name, x in arrays.items()
    }
    # Transformers reads only files that say what they were made for.
    try:
        safetensors.serialize_file(specs, str(path), metadata={"format": "pt"})
        share(path)
    except safetensors.SafetensorError as error:
        raise OSError(f"The weights could not be written: {error}.") from error
