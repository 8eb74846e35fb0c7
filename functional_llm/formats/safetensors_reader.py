"""Reads the tensors of a folder of safetensors files one at a time, straight into a final dtype.

The safetensors library maps a whole file into memory, and every page read stays resident: at the
end of a load that is a second copy of the model. Here the bytes are read in small blocks. The
header is checked against the size of the file before anything is allocated.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from functional_llm.files.json_files import parse_json_object
from functional_llm.formats.tensor_reader import (
    WHOLE,
    bad_file,
    find_entry,
    float_dtype,
    read_as_stored,
    read_blocks,
    some,
    stored_dtype,
)
from functional_llm.graph.types import JSON

INDEX_NAME = "model.safetensors.index.json"

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bits of the types a checkpoint may hold without anyone reading them (a buffer of integers).
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "BOOL": 8, "C64": 64}
_BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
# The limit of the reference implementation; the largest models stay under a megabyte.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where the bytes of one tensor lie: `size` bytes at `offset` from the start of `path`."""

    path: Path
    stored: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of one or many safetensors files. Made by `open_safetensors`."""

    path: Path
    entries: dict[str, TensorEntry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Reads one tensor; the arguments and errors of `read_rows`, without rows."""
        return self.read_rows(name, dtype, WHOLE)

    def read_rows(self, name: str, dtype: str, rows: slice) -> np.ndarray:
        """Reads some rows of one tensor.

        Args:
            name: Name of the tensor, a key of `shapes`.
            dtype: `"float32"`, `"float16"` or `"bfloat16"`.
            rows: Those to read, of its first axis; the others have any values, and no memory.

        Returns:
            A new array of that dtype.

        Raises:
            ValueError: If the tensor is not there, is stored in a type that is no float of 16, 32
                or 64 bits, or holds a number that `dtype` cannot hold.
        """
        entry = find_entry(self.path, self.entries, name)
        if entry.stored not in _FLOATS:
            raise ValueError(
                f"Cannot read the tensor {name!r} of {entry.path}: expected one of "
                f"{', '.join(_FLOATS)}. Received: {entry.stored}. "
                "Use a checkpoint that is not quantised."
            )
        stored = stored_dtype(_FLOATS[entry.stored])
        part = rows
        if rows != WHOLE:
            row = math.prod(entry.shape[1:])
            part = slice(rows.start * row, rows.stop * row)
        if stored == float_dtype(dtype):
            return read_as_stored(entry.path, name, entry.offset, entry.shape, dtype, part)
        return read_blocks(
            entry.path,
            name,
            entry.offset,
            entry.shape,
            dtype,
            block=(1, stored.itemsize),
            decode=lambda raw: raw.view(stored),
            part=part,
        )


def open_safetensors(folder: str | Path) -> SafetensorsFolder:
    """Opens the safetensors files of a folder and checks their headers.

    Args:
        folder: A folder with `model.safetensors`, or `model.safetensors.index.json` and its
            shards, or a single file `*.safetensors`; or the path of such a file.

    Returns:
        A `SafetensorsFolder`.

    Raises:
        FileNotFoundError: If there is no such file, or a shard is missing.
        ValueError: If a file is damaged, or two shards hold the same tensor.
    """
    folder = Path(folder)
    if folder.is_file():
        return SafetensorsFolder(folder, read_header(folder))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder with safetensors files. Received: {folder}, which does not exist."
        )
    # Transformers prefers the single file where both are there.
    if (folder / "model.safetensors").is_file():
        return SafetensorsFolder(folder, read_header(folder / "model.safetensors"))
    if (folder / INDEX_NAME).is_file():
        return SafetensorsFolder(folder, _read_shards(folder))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return SafetensorsFolder(folder, read_header(files[0]))
    received = some(path.name for path in files) if files else "no *.safetensors file"
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    raise FileNotFoundError(
        f"Expected model.safetensors, or {INDEX_NAME} and its shards, or a single *.safetensors "
        f"file in {folder}. Received: {some(pickles) if pickles else received}. A .bin file is a "
        "pickle, which may run any code and is not opened. Convert it with Transformers, where "
        "you trust it: `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`."
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads and checks the header of one safetensors file.

    Args:
        path: The file.

    Returns:
        The entry of every tensor, by name.

    Raises:
        ValueError: If the header is damaged or claims what the file does not hold.
    """
    header, data_start, file_size = _load_header(path)
    header.pop("__metadata__", None)
    entries = {
        name: _checked_entry(path, name, fields, data_start, file_size)
        for name, fields in header.items()
    }
    # The format leaves no hole between tensors: gaps, overlaps and a wrong end all show here.
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != position:
            raise bad_file(
                path,
                f"the tensor {name!r} to begin where the one before it ends, at byte {position}",
                f"it begins at byte {entry.offset}",
            )
        position += entry.size
    if position != file_size:
        raise bad_file(path, f"{position} bytes, as its header says", f"{file_size} bytes")
    return entries


def _load_header(path: Path) -> tuple[JSON, int, int]:
    with path.open("rb") as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > min(file_size - 8, _MAX_HEADER_BYTES):
            raise bad_file(
                path,
                f"a header that fits the file's {file_size} bytes and {_MAX_HEADER_BYTES}",
                f"a header of {length} bytes" if file_size >= 8 else "no header",
            )
        text = file.read(length)
    header = _parse_header(path, text)
    return header, 8 + length, file_size


def _parse_header(path: Path, text: bytes) -> JSON:
    try:
        return parse_json_object(text, "it", unique_keys=True)
    except ValueError as error:
        raise bad_file(path, "a JSON object in UTF-8", f"{text[:40]!r}… ({error})") from None


def _checked_entry(
    path: Path, name: str, fields: object, start: int, file_size: int
) -> TensorEntry:
    data_size = file_size - start
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise bad_file(path, f"dtype, shape and data_offsets for {name!r}", f"{fields!r:.200}")
    stored, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(stored, str) or stored not in _BITS:
        raise bad_file(
            path,
            f"a known type for {name!r} ({', '.join(_FLOATS)})",
            f"{stored!r:.60}",
            "Use a checkpoint in one of these types.",
        )
    # No dimension can exceed the data (unless another is zero, and then it means nothing), and
    # NumPy stops at 64 of them: with both bounds the product below stays a small number.
    if not _are_sizes(shape, data_size) or len(shape) > 64:
        raise bad_file(path, f"a shape that fits the file for {name!r}", f"{shape!r:.200}")
    if not _are_sizes(offsets, data_size) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad_file(
            path,
            f"data_offsets [begin, end] for {name!r} within its {data_size} bytes of data",
            f"{offsets!r:.200}",
        )
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[stored]:
        raise bad_file(
            path,
            f"{math.prod(shape) * _BITS[stored] / 8:g} bytes for {name!r}, {stored} {shape}",
            f"{end - begin} bytes",
        )
    return TensorEntry(path, stored, tuple(shape), start + begin, end - begin)


def _are_sizes(values: object, limit: int) -> bool:
    # `type`, because True is an int to isinstance.
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= limit for v in values)


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX_NAME
    placed = _parse_header(index, index.read_bytes()).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise bad_file(index, "a weight_map from tensors to files", f"{placed!r:.200}")
    for name, file in placed.items():
        # A name with a folder in it could reach any file of the machine.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise bad_file(index, f"the name of a file in {folder} for {name!r}", f"{file!r:.200}")
    files = sorted(set(placed.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected the {len(files)} shards that {index} names. Missing: {some(missing)}. "
            "Download them into the same folder."
        )
    # As Transformers: the index says which files there are, and they say what is in them.
    shards = {file: read_header(folder / file) for file in files}
    counts = Counter(name for entries in shards.values() for name in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise bad_file(
            index,
            "each tensor in one shard",
            f"in two shards: {some(twice)}",
            "The shards are of different models: download them again.",
        )
    return {name: entry for entries in shards.values() for name, entry in entries.items()}
