"""4-bit blocks of GGUF files, as integers with their scales and offsets.

Shapes: ... blocks, G numbers of a group.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K

from functional_llm.formats.gguf_file import GGUFFile
from functional_llm.formats.grid import SIZE, Grid
from functional_llm.formats.tensor_reader import bad_file, find_entry

_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # bytes of integers, scales, offsets


def read_grid(file: GGUFFile, name: str) -> Grid | None:
    """Returns a tensor as the grid that its blocks are; `None` if they are none.

    Q4_0 and Q4_1 come out exactly. Scales and offsets of Q4_K are products of two numbers in the
    file, and are rounded to float16; the integers stay.

    Args:
        file: The file.
        name: Name of the tensor, a key of `file.shapes`.
    """
    tensor = find_entry(file.path, file.tensors, name)
    if tensor.kind not in _TYPES:
        return None
    with file.path.open("rb") as opened:
        opened.seek(tensor.offset)
        raw = np.fromfile(opened, np.uint8, tensor.size)
    if raw.size != tensor.size:
        raise bad_file(file.path, f"the data of the tensor {name!r}", "the end of the file")
    pairs, scale, offset = _TYPES[tensor.kind](raw.reshape(-1, GGML_QUANT_SIZES[tensor.kind][1]))
    # A byte holds a number of the first half of what was packed together, and one of the second.
    integers = np.stack([pairs & 0x0F, pairs >> 4], axis=1).view(np.int8)
    integers -= 8
    *first, last = tensor.shape
    groups = (*first, last // SIZE)
    return Grid(integers.reshape(tensor.shape), scale.reshape(groups), offset.reshape(groups))


def _half(raw: np.ndarray, index: int) -> np.ndarray:
    return np.ascontiguousarray(raw[:, 2 * index : 2 * index + 2]).view(np.float16)[:, 0]


def _parts_q4_0(raw: np.ndarray) -> _Parts:
    scale = _half(raw, 0)
    return raw[:, 2:], scale, scale * np.float16(-8)


def _parts_q4_1(raw: np.ndarray) -> _Parts:
    return raw[:, 4:], _half(raw, 0), _half(raw, 1)


def _parts_q4_k(raw: np.ndarray) -> _Parts:
    """Eight groups in a block, with scales and least numbers of 6 bits."""
    scales, least = Q4_K.get_scale_min(np.ascontiguousarray(raw[:, 4 : 4 + Q4_K.K_SCALE_SIZE]))
    d, m = (_half(raw, i).astype(np.float32)[:, None] for i in range(2))
    pairs = raw[:, 4 + Q4_K.K_SCALE_SIZE :].reshape(-1, SIZE)
    return pairs, (d * scales).astype(np.float16), (-m * least).astype(np.float16)


_TYPES: dict[GGMLQuantizationType, Callable[[np.ndarray], _Parts]] = {
    GGMLQuantizationType.Q4_0: _parts_q4_0,
    GGMLQuantizationType.Q4_1: _parts_q4_1,
    GGMLQuantizationType.Q4_K: _parts_q4_k,
}
