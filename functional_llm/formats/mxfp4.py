"""MXFP4 tensors of a checkpoint, as the numbers that they stand for.

Thirty-two numbers of four bits, in sixteen bytes, share a power of two, in one byte. A tensor
`x` (experts, in, out) is stored as `x_blocks` (experts, out, in / 32, 16) and `x_scales`
(experts, out, in / 32). Reference: the [OCP specification of microscaling
formats](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from functional_llm.formats.safetensors_reader import SafetensorsFolder
from functional_llm.formats.tensor_reader import read_blocks
from functional_llm.formats.tensor_source import TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES, _NUMBERS = 16, 32  # of a block
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
# What each byte of scales stands for; the last is no number.
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
# The two numbers of each byte, that of its low half first: one entry, which is ten times as fast.
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1).view(np.uint64)[:, 0]


def is_mxfp4(quantization: object) -> bool:
    """Whether a `quantization_config` says that some tensors are MXFP4."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def unpacked(folder: SafetensorsFolder) -> TensorSource:
    """Returns the tensors of a folder, those in MXFP4 as the numbers that they stand for.

    Args:
        folder: The tensors as they are stored.

    Raises:
        ValueError: Naming every MXFP4 tensor whose blocks and scales do not belong together.
    """
    problems, names = [], []
    for name, entry in folder.entries.items():
        if not name.endswith((_BLOCKS, _SCALES)):
            continue
        whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks, scales = (folder.entries.get(whole + x) for x in (_BLOCKS, _SCALES))
        if blocks is None or scales is None:
            other = _SCALES if scales is None else _BLOCKS
            problems.append(f"{name!r} of shape {entry.shape}: no {whole + other!r} beside it")
        elif name.endswith(_BLOCKS):
            names.append(whole)
            if (blocks.stored, scales.stored) != ("U8", "U8"):
                problems.append(
                    f"{name!r} and its scales: expected bytes (U8), received {blocks.stored} and "
                    f"{scales.stored}"
                )
            elif blocks.shape != (*scales.shape, _BYTES) or len(scales.shape) < 2:
                problems.append(
                    f"{name!r}: expected shape {(*scales.shape, _BYTES)}, {_BYTES} bytes for each "
                    f"of {whole + _SCALES!r} of shape {scales.shape}, received {blocks.shape}"
                )
    if problems:
        raise ValueError(
            f"{folder.path} has MXFP4 tensors that do not fit together:\n  "
            + "\n  ".join(problems)
            + "\nDownload the files again."
        )
    return _Unpacked(folder, frozenset(names)) if names else folder


@dataclass(frozen=True)
class _Unpacked:
    """The tensors of a folder, some of them unpacked.

    Args:
        folder: The tensors as they are stored.
        names: Those that are unpacked, without what their parts have behind it.
    """

    folder: SafetensorsFolder
    names: frozenset[str]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        parts = {name + part for name in self.names for part in (_BLOCKS, _SCALES)}
        plain = {name: x for name, x in self.folder.shapes.items() if name not in parts}
        return plain | {name: self._stored_shape(name, swap=True) for name in self.names}

    def _stored_shape(self, name: str, swap: bool) -> tuple[int, ...]:
        *first, rows, groups = self.folder.entries[name + _SCALES].shape
        last = (groups * _NUMBERS, rows) if swap else (rows, groups * _NUMBERS)
        return (*first, *last)

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        if name not in self.names:
            return self.folder.read(name, dtype)
        blocks, scales = (self.folder.entries[name + x] for x in (_BLOCKS, _SCALES))
        factors = np.fromfile(scales.path, np.uint8, scales.size, offset=scales.offset)
        done = 0

        def decode(raw: np.ndarray) -> np.ndarray:
            nonlocal done
            values = _PAIRS.take(raw).view(np.float32).reshape(-1, _NUMBERS)
            own = _POWERS[factors[done : done + len(values)]]
            done += len(values)
            with np.errstate(over="ignore"):
                return (values * own[:, None]).reshape(-1)

        array = read_blocks(
            blocks.path,
            name + _BLOCKS,
            blocks.offset,
            self._stored_shape(name, swap=False),
            dtype,
            block=(_NUMBERS, _BYTES),
            decode=decode,
        )
        return array.swapaxes(-1, -2)
