"""Which of several processes this is: one of them writes files and prints."""

import sys
from typing import Any


def place_among_processes() -> tuple[int, int]:
    """Returns the number of this process, and how many there are; (0, 1) if it is alone.

    Several are those of `jax.distributed`. Nothing is imported, and no device is looked for.
    """
    jax: Any = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes files, of several that compute the same."""
    return place_among_processes()[0] == 0
