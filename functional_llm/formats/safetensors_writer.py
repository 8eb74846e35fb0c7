"""Writes the weights of a directory in Hugging Face layout, in shards."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors

from functional_llm.files.json_files import write_json
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


def _write_shard(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
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
