"""How fast the machine reads memory just now: the limit of decoding one text."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 1 << 29  # far more than a cache holds
_PASSES = 3


def read_bandwidth() -> float:
    """Returns the GB/s that all processors together read: the best of a few passes."""
    count = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_BYTES // 4, "float32"), count)
    seconds = []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(_PASSES):
            started = time.perf_counter()
            list(pool.map(np.dot, parts, parts))
            seconds.append(time.perf_counter() - started)
    return _BYTES / min(seconds) / 1e9
