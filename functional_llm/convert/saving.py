"""Writes a directory in Hugging Face layout: weights in shards, whole or not at all; JSON files."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from functional_llm.convert.safetensors import INDEX_NAME

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX_NAME)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside; its files move into `folder` once all of them are written.

    Files of other names that are in `folder` already stay, but for weights. If anything fails,
    nothing of the old is lost and nothing of the new is left.

    Raises:
        OSError: If there is a file at `folder`, or it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"Expected a folder to write to. Received: {folder}, which is a file.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"Expected a folder that can be written to. Received: {folder} ({error.strerror})."
        ) from error
    try:
        yield beside
        if not folder.exists():
            beside.chmod(0o777 & ~_umask())  # temporary folders are for this user only
            os.replace(beside, folder)
            return
        old = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
        for path in sorted(beside.iterdir()):
            os.replace(path, folder / path.name)
            old.discard(folder / path.name)
        for path in old:
            path.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def share(path: Path) -> None:
    """Gives a file the permissions of any new file; safetensors keeps all others from reading."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the object in a file; `default` if there is no file.

    Raises:
        FileNotFoundError: If there is no file and no default.
        ValueError: If it holds no JSON object.
    """
    if not path.is_file() and default is not None:
        return default
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path.name} in {path.parent}: it is not there.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, received {type(raw).__name__}.")
    return raw


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
