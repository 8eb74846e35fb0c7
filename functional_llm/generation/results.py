"""What a generation has written, and how long it took.

Shapes: B rows.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


@dataclass
class Stats:
    """Where the time of one generation went.

    Args:
        compile_seconds: Tracing and compiling, or reading the compilation cache.
        prefill_seconds: The prompt, up to the first token.
        prefill_tokens: Tokens of the prompts, without padding.
        decode_seconds: The rest.
        decode_tokens: Tokens of all rows after the first.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to the field of this name."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class NewTokens:
    """What one run has written.

    Args:
        ids: The new ids of each row.
        is_done: (B,) bool, which rows have ended; shared with the loop that writes.
    """

    ids: list[list[int]]
    is_done: np.ndarray

    def finish_row(self, row: int) -> None:
        """Ends a row in whose text a stop string was found."""
        self.is_done[row] = True
