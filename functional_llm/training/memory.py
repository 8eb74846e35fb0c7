"""Memory that a training step frees and the next step needs again."""

import ctypes
import os

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Makes the process keep the memory that it frees; returns whether it does.

    On CPUs, XLA frees the gigabytes of a training step and allocates them again in the next one.
    glibc gives them back to the system, which then clears every page: a sixth of the time of a LoRA
    step of SmolLM2. Small programs may gain nothing. The process keeps its peak until it ends.

    Call it before JAX computes anything: a thread keeps the settings that it starts with. It does
    nothing without glibc, or if the environment has a variable that begins with `MALLOC_`.

    Reference:
        [mallopt](https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (AttributeError, OSError):
        return False
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # -1: never give back
    return all(mallopt(option, value) for option, value in options.items())
