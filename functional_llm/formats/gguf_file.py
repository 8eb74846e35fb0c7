"""Reads a GGUF file: its metadata, and its tensors one at a time, dequantised into a final dtype.

The header is parsed here and not by `gguf.GGUFReader`: that makes a NumPy array of every string,
three seconds for a vocabulary of 49,152 tokens, and trusts the sizes that the file claims. The
types, their block sizes and the arithmetic of dequantising are the gguf package's.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from functional_llm.formats.tensor_reader import bad_file, find_entry, read_blocks

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
# One bound for every length in the header, so that a damaged one in a file of 50 GB does not
# allocate 50 GB. A vocabulary of 262,144 tokens with its merges and scores takes 20 MB.
_MAX_HEADER_BYTES = 1 << 27
# The least a key with its value, and a tensor's description, take: they bound the counts.
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

_NUMBERS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("<u1"),
}
_PLAIN: dict[int, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype(np.float64),
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: its type, shape in NumPy's order, and place in the file in bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and tensors of a GGUF file. Made by `open_gguf`."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in NumPy's order (the file has the dimensions reversed)."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Reads and dequantises one tensor.

        Args:
            name: Name of the tensor, a key of `shapes`.
            dtype: `"float32"`, `"float16"` or `"bfloat16"`.

        Returns:
            A new array of that dtype. Nothing else of the tensor's size exists at any time.

        Raises:
            ValueError: If the tensor is not there, its type is one that cannot be dequantised, or
                it holds a number that `dtype` cannot hold.
        """
        tensor = find_entry(self.path, self.tensors, name)

        def decode(raw: np.ndarray) -> np.ndarray:
            if tensor.kind in _PLAIN:
                return raw.view(_PLAIN[tensor.kind])
            # In one row: gguf works through rows in groups of 16, and many short ones are slow.
            with np.errstate(all="ignore"):
                values: np.ndarray = dequantize(raw.reshape(1, -1), tensor.kind)[0]
            return values

        try:
            return read_blocks(
                self.path,
                name,
                tensor.offset,
                tensor.shape,
                dtype,
                block=GGML_QUANT_SIZES[tensor.kind],
                decode=decode,
            )
        except NotImplementedError:
            raise bad_file(
                self.path,
                f"a type that the gguf package can dequantise for {name!r}",
                tensor.kind.name,
                "Use another quantisation of the model, or a newer gguf.",
            ) from None


def open_gguf(path: str | Path) -> GGUFFile:
    """Reads and checks the header of a GGUF file.

    Args:
        path: The file: GGUF version 2 or 3, little endian.

    Returns:
        A `GGUFFile`.

    Raises:
        ValueError: If the file is no GGUF file, is damaged, or claims what it does not hold.
    """
    path = Path(path)
    status = path.stat()
    return _read_file(path, status.st_mtime_ns, status.st_size)


# A model and its tokenizer are read one after the other. The time and the size tell a new file.
@lru_cache(maxsize=1)
def _read_file(path: Path, modified: int, size: int) -> GGUFFile:
    with path.open("rb") as file:
        header = _Header(path, file)
        tensor_count, field_count = _read_counts(header)
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = header.string("a key")
            if key in metadata:
                raise header.bad("every key once", f"{key!r} twice")
            metadata[key] = header.value(header.number(GGUFValueType.UINT32, key), key)
        if metadata.get("split.count", 1) != 1:
            raise header.bad(
                "a model in one file",
                f"one of {metadata['split.count']} parts",
                "Join them with `llama-gguf-split --merge`.",
            )
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(tensor_count):
            name = header.string("the name of a tensor")
            if name in tensors:
                raise header.bad("every tensor once", f"{name!r} twice")
            tensors[name] = _read_tensor(header, name)
        return GGUFFile(path, metadata, _place_tensors(header, tensors, metadata))


class _Header:
    """A position in the header that refuses to move past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.file_size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.end = min(self.file_size, _MAX_HEADER_BYTES)

    def bad(self, expected: str, received: str, *advice: str) -> ValueError:
        return bad_file(self.path, expected, received, *advice)

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.position:
            raise self.bad(
                f"{what} in the {self.end - self.position} bytes after byte {self.position}",
                f"a size of {count} bytes",
            )
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            raise self.bad(f"{count} bytes of {what}", f"{len(data)} bytes")
        return data

    def number(self, kind: int, what: str) -> Any:
        value = np.frombuffer(self.take(_NUMBERS[kind].itemsize, what), _NUMBERS[kind])[0].item()
        return self._boolean(value, what) if kind == GGUFValueType.BOOL else value

    def string(self, what: str) -> str:
        # The only value that a vocabulary repeats a hundred thousand times: struct is faster.
        (length,) = struct.unpack("<Q", self.take(8, what))
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} in UTF-8", f"{data[:40]!r}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind not in _NUMBERS:
            raise self.bad(f"a known type for the value of {key!r}", f"type {kind}")
        return self.number(kind, key)

    def _array(self, key: str) -> list[Any]:
        kind = self.number(GGUFValueType.UINT32, key)
        count = self.number(GGUFValueType.UINT64, key)
        if kind != GGUFValueType.STRING and kind not in _NUMBERS:
            raise self.bad(f"numbers or strings in the array {key!r}", f"type {kind}")
        size = 8 if kind == GGUFValueType.STRING else _NUMBERS[kind].itemsize
        self.check_count(count, size, f"values of {key!r}")
        if kind == GGUFValueType.STRING:
            return [self.string(key) for _ in range(count)]
        values: list[Any] = np.frombuffer(self.take(count * size, key), _NUMBERS[kind]).tolist()
        if kind == GGUFValueType.BOOL:
            return [self._boolean(value, key) for value in values]
        return values

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        most = (self.end - self.position) // least_bytes
        if count > most:
            raise self.bad(f"at most {most} {what}, by the size of the file", f"{count}")

    def _boolean(self, value: int, what: str) -> bool:
        if value not in (0, 1):
            raise self.bad(f"0 or 1 for {what!r}", f"{value}")
        return bool(value)


def _read_counts(header: _Header) -> tuple[int, int]:
    magic = header.take(min(4, header.end), "the word GGUF")
    if magic != _MAGIC:
        raise header.bad(
            "a GGUF file, which begins with b'GGUF'",
            f"{magic!r}",
            "Give the path of a .gguf file, or download it again.",
        )
    version = header.number(GGUFValueType.UINT32, "the version")
    if version not in _VERSIONS:
        # A small version in the upper half of the word was written by a big-endian machine.
        big_endian = version & 0xFFFF == 0 and version != 0
        raise header.bad(
            "GGUF version 2 or 3, little endian",
            "a big-endian file" if big_endian else f"version {version}",
            "Convert the model again with a current llama.cpp.",
        )
    tensor_count = header.number(GGUFValueType.UINT64, "the number of tensors")
    field_count = header.number(GGUFValueType.UINT64, "the number of keys")
    header.check_count(field_count, _MIN_FIELD_BYTES, "keys")
    header.check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
    return tensor_count, field_count


def _read_tensor(header: _Header, name: str) -> GGUFTensor:
    rank = header.number(GGUFValueType.UINT32, name)
    if rank > _MAX_DIMS:
        raise header.bad(f"at most {_MAX_DIMS} dimensions of {name!r}", f"{rank}")
    dims = [header.number(GGUFValueType.UINT64, name) for _ in range(rank)]
    kind = header.number(GGUFValueType.UINT32, name)
    offset = header.number(GGUFValueType.UINT64, name)
    if not all(1 <= dim <= header.file_size * 8 for dim in dims):
        # Even one bit a weight would not fit.
        raise header.bad(f"dimensions of {name!r} that fit the file", f"{dims}")
    if kind not in list(GGMLQuantizationType):
        raise header.bad(
            f"a known type of the tensor {name!r}",
            f"type {kind}",
            "Use another quantisation of the model, or a newer gguf package.",
        )
    kind = GGMLQuantizationType(kind)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    # ggml counts no axis of length one at the end. Some of llama.cpp's converters write such up to
    # four axes; files that were quantised afterwards are without.
    while rank == _MAX_DIMS and len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    shape = tuple(reversed(dims))
    if shape and shape[-1] % block_elements:
        raise header.bad(
            f"rows of {name!r} in whole blocks of {block_elements} ({kind.name})",
            f"rows of {shape[-1]}",
        )
    if not shape and block_elements > 1:
        raise header.bad(f"a plain type for the single number {name!r}", kind.name)
    return GGUFTensor(kind, shape, offset, math.prod(shape) // block_elements * block_bytes)


def _place_tensors(
    header: _Header, tensors: dict[str, GGUFTensor], metadata: dict[str, Any]
) -> dict[str, GGUFTensor]:
    """Turns offsets within the data into offsets within the file, and checks their extents."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.bad("general.alignment to be a power of two", f"{alignment!r:.60}")
    data_start = -(-header.position // alignment) * alignment
    placed: dict[str, GGUFTensor] = {}
    taken = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment or tensor.offset < taken:
            raise header.bad(
                f"{name!r} at a multiple of {alignment} from byte {taken} of the data on",
                f"byte {tensor.offset}",
            )
        taken = tensor.offset + tensor.size
        if data_start + taken > header.file_size:
            raise header.bad(
                f"at least {data_start + taken} bytes, to hold {name!r}",
                f"a file of {header.file_size} bytes",
            )
        placed[name] = GGUFTensor(
            tensor.kind, tensor.shape, data_start + tensor.offset, tensor.size
        )
    return {name: placed[name] for name in tensors}  # in the order of the file
