"""Singular directions of a matrix, kept on disk: they take minutes for a model.

They are not in the adapter's file because they are as large as the weights. They lie beside the
downloads, one file a matrix, under the hash of its numbers, so that other numbers never find them.
Only V is kept: `W V` is `U s`.
"""

import hashlib
from pathlib import Path

import numpy as np

from functional_llm.files.replacing import replaced_file
from functional_llm.formats.download import cache_directory

_FOLDER = "singular_directions"
_WORTH_KEEPING = 1 << 16  # numbers in a matrix; smaller ones take milliseconds


def singular_directions(matrix: np.ndarray) -> np.ndarray:
    """Returns V of a matrix `U diag(s) V`, the largest s first.

    Args:
        matrix: (in, out), float32.

    Returns:
        (k, out), with k the smaller size of the matrix.
    """
    path = _place(matrix) if matrix.size >= _WORTH_KEEPING else None
    kept = None if path is None else _read(path, (min(matrix.shape), matrix.shape[1]))
    if kept is not None:
        return kept
    vt = np.linalg.svd(matrix, full_matrices=False)[2]
    if path is not None:
        _keep(path, vt)
    return vt


def _place(matrix: np.ndarray) -> Path | None:
    digest = hashlib.sha256(matrix.tobytes())
    digest.update(repr(matrix.shape).encode())
    try:
        return cache_directory() / _FOLDER / f"{digest.hexdigest()[:40]}.npy"
    except OSError:  # no cache that can be written to: then nothing is kept
        return None


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        kept = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == np.float32 else None


def _keep(path: Path, vt: np.ndarray) -> None:
    try:
        with replaced_file(path) as part, part.open("wb") as file:
            np.save(file, vt)
    except OSError:
        return  # the disk is full, say: it is computed again
