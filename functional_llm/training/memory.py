"""What the process does with memory that it needs again in the next step."""

import ctypes
import os

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Lets the process keep freed memory for its own use; returns whether it does.

    On CPUs, XLA frees the gigabytes of a training step after it and asks for them anew in the next
    one. glibc hands them back to the system, which clears every page again: a sixth of the time of
    a LoRA step of SmolLM2. Small programs may not gain anything. To be called before JAX computes
    anything, for each thread keeps the rules it began with. The process then holds its peak until
    it ends.

    Nothing happens without glibc, or if a `MALLOC_` variable in the environment says otherwise.

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
