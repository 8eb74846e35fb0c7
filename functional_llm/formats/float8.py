"""Float8 tensors of a checkpoint in blocks with a scale each, as the numbers that they stand for.

So DeepSeek V3 is published: beside a matrix `x` (out, in) in E4M3 lies `x_scale_inv`, a factor for
each 128 x 128 of its numbers, or what there is of them at its edges. Reference:
[DeepSeek-V3](https://arxiv.org/abs/2412.19437), section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from functional_llm.formats.safetensors_reader import SafetensorsFolder
from functional_llm.formats.tensor_reader import read_blocks
from functional_llm.formats.tensor_source import TensorSource

_SCALES, _SIDE = "_scale_inv", 128
_VALUES = np.arange(256, dtype="uint8").view(ml_dtypes.float8_e4m3fn).astype("float32")


def is_float8(quantization: object) -> bool:
    """Whether a `quantization_config` says that some tensors are float8 in blocks of 128 x 128."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "fp8"
        and quantization.get("fmt", "e4m3") == "e4m3"
        and quantization.get("weight_block_size") == [_SIDE, _SIDE]
    )


def scaled_back(folder: SafetensorsFolder) -> TensorSource:
    """Returns the tensors of a folder, those in float8 as the numbers that they stand for.

    Args:
        folder: The tensors as they are stored.

    Raises:
        ValueError: Naming every float8 tensor without the scales that it needs.
    """
    problems, names = [], []
    for name, entry in folder.entries.items():
        if entry.stored != "F8_E4M3":
            continue
        names.append(name)
        scales = folder.entries.get(name + _SCALES)
        shape = tuple(-(-size // _SIDE) for size in entry.shape)
        expected = f"{name!r} of shape {entry.shape}: expected {name + _SCALES!r} of shape {shape}"
        if scales is None:
            problems.append(f"{expected} beside it, received none")
        elif scales.shape != shape or len(shape) != 2 or scales.stored != "F32":
            problems.append(f"{expected} in F32, received {scales.shape} in {scales.stored}")
    if not any(name + _SCALES in folder.entries for name in names):
        return folder  # float8 of another kind, which nobody reads
    if problems:
        raise ValueError(
            f"{folder.path} has float8 tensors whose scales do not fit:\n  "
            + "\n  ".join(problems)
            + "\nDownload the files again."
        )
    return _ScaledBack(folder, frozenset(names))


@dataclass(frozen=True)
class _ScaledBack:
    """The tensors of a folder, some of them multiplied with their scales.

    Args:
        folder: The tensors as they are stored.
        names: Those that have scales.
    """

    folder: SafetensorsFolder
    names: frozenset[str]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        scales = {name + _SCALES for name in self.names}
        return {name: x for name, x in self.folder.shapes.items() if name not in scales}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        if name not in self.names:
            return self.folder.read(name, dtype)
        entry, scales = self.folder.entries[name], self.folder.read(name + _SCALES, "float32")
        columns, begin = entry.shape[1], 0

        def decode(raw: np.ndarray) -> np.ndarray:
            nonlocal begin
            values = _VALUES[raw].reshape(-1, columns)
            own = scales[np.arange(begin, begin + len(values)) // _SIDE]
            begin += len(values)
            return (values * np.repeat(own, _SIDE, axis=1)[:, :columns]).reshape(-1)

        return read_blocks(
            entry.path,
            name,
            entry.offset,
            entry.shape,
            dtype,
            block=(columns, columns),
            decode=decode,
        )
