"""What is measured: functions of an engine and the number of the round, run in the worker.

A new measure is a function here, and a line in `MEASURES`. Shapes: B rows, T tokens.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.engines.base import Engine

CHECK = "check"
_NEW_TOKENS = 128
_PROMPT_TOKENS = 32
_CHECKED_TOKENS = 48
# SmolLM2's ids of "The capital of France is", "Once upon a time there", "def fibonacci(": they
# go on with some certainty, unlike noise, and have one length, for which one program will do.
_CHECKED_PROMPTS = (
    [504, 3575, 282, 4649, 314],
    [6403, 1980, 253, 655, 665],
    [1604, 3987, 46477, 24, 94],
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measurement.

    Args:
        title: What it is, for tables.
        unit: Of its figures.
        run: Function from the engine and the number of the round to the figure. Round 0 warms up:
            it compiles, and does not count.
        more_is_better: Whether a large figure is a good one.
    """

    title: str
    unit: str
    run: Callable[[Engine, int], float]
    more_is_better: bool = True


def make_prompts(batch_size: int, length: int, round_number: int) -> list[list[int]]:
    """Returns (B, T) ids: other ones in each round, the same for every engine.

    Ids from 100 to 1000 are frequent words in most vocabularies, and none of the special tokens.
    """
    rng = np.random.default_rng([round_number, batch_size, length])
    return rng.integers(100, 1000, (batch_size, length)).tolist()


def measure_decode(engine: Engine, round_number: int, batch_size: int) -> float:
    """Tokens a second of all rows together, prefill left out.

    By difference, for not every engine tells when its prefill ended: a run with all new tokens
    less a run with one.
    """
    prompts = make_prompts(batch_size, _PROMPT_TOKENS, round_number)
    _, short = _timed(engine, prompts, 1)
    ids, whole = _timed(engine, prompts, _NEW_TOKENS)
    if [len(row) for row in ids] != [_NEW_TOKENS] * batch_size:
        raise RuntimeError(f"Expected {_NEW_TOKENS} ids a row, got {[len(row) for row in ids]}.")
    return batch_size * (_NEW_TOKENS - 1) / (whole - short)


def measure_prefill(engine: Engine, round_number: int, length: int) -> float:
    """Tokens of one prompt a second, up to the first new id."""
    _, seconds = _timed(engine, make_prompts(1, length, round_number), 1)
    return length / seconds


def measure_peak_memory(engine: Engine, round_number: int) -> float:
    """The most memory the process has held so far, loading and compiling included, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_ids(engine: Engine) -> dict[str, Any]:
    """Greedy ids after fixed texts, to compare engines before anything is timed."""
    return {"ids": [engine.generate([row], _CHECKED_TOKENS)[0] for row in _CHECKED_PROMPTS]}


def _timed(engine: Engine, prompts: list[list[int]], num_new: int) -> tuple[Any, float]:
    started = time.perf_counter()
    ids = engine.generate(prompts, num_new)
    return ids, time.perf_counter() - started


MEASURES = {
    "decode_1": Measure(
        title="decode, batch 1", unit="tokens/s", run=partial(measure_decode, batch_size=1)
    ),
    "decode_8": Measure(
        title="decode, batch 8", unit="tokens/s", run=partial(measure_decode, batch_size=8)
    ),
    "decode_32": Measure(
        title="decode, batch 32", unit="tokens/s", run=partial(measure_decode, batch_size=32)
    ),
    "prefill_32": Measure(
        title="prefill, 32 tokens", unit="tokens/s", run=partial(measure_prefill, length=32)
    ),
    "prefill_512": Measure(
        title="prefill, 512 tokens", unit="tokens/s", run=partial(measure_prefill, length=512)
    ),
    "prefill_2048": Measure(
        title="prefill, 2048 tokens", unit="tokens/s", run=partial(measure_prefill, length=2048)
    ),
    "peak_memory": Measure(
        title="peak memory so far", unit="MB", run=measure_peak_memory, more_is_better=False
    ),
}
