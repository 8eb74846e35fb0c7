"""What is measured on accelerators: functions of an engine and a size, run in the worker.

A size is written as it is measured: `8x512+128` is 8 prompts of 512 tokens and 128 new ones each,
`4x2048` 4 rows of 2048 tokens.
"""

import importlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.engines.base import Engine, Trainer
from benchmarks.measures import make_prompts

_CALLS, _STEPS = 2, 4  # timed, after the first
# In the order in which they are measured: the most telling first, if the time should end.
WORKS: dict[str, dict[str, Any]] = {
    "text": {},
    "lora_qv": {"lora": True, "targets": "qv"},
    "lora_all": {"lora": True},
    "full": {"lora": False},
    "lora_remat": {"lora": True, "remat": True},
}
_TRAINERS = ("functional_llm", "keras_hub", "transformers")
ENGINES_OF = {work: _TRAINERS for work in WORKS} | {
    "lora_remat": ("functional_llm", "transformers")  # KerasHub computes nothing again
}
_TRAINING = ["4x2048"]
SIZES = {
    "text": ["1x512+128", "8x512+128", "64x512+128", "1x512+1", "1x8192+1"],
    "lora_qv": _TRAINING,
    "lora_all": _TRAINING,
    "full": _TRAINING,
    "lora_remat": ["1x8192", "1x32768"],
}
SMOKE_SIZES = {work: ["1x16"] for work in WORKS} | {"text": ["2x8+4"]}


def load(engine: str, work: str, folder: Path, precision: str) -> Any:
    """Returns an engine's `Engine` or `Trainer` with random weights; in its own process."""
    entry = ENGINES[engine]
    module = importlib.import_module(f"benchmarks.engines.{entry.module}")
    name = entry.cls if work == "text" else str(entry.trainer)
    return getattr(module, name)(folder, precision, load_weights=False, **WORKS[work])


def measure(subject: Any, size: str) -> dict[str, float]:
    """Returns tokens a second, seconds of the first call, and the peak of memory so far in bytes.

    Args:
        subject: From `load`.
        size: As above.
    """
    if "+" in size:
        run, tokens, times = _generating(subject, size)
    else:
        run, tokens, times = _training(subject, size)
    started = time.perf_counter()
    run(0)
    first = time.perf_counter() - started
    seconds = []
    for number in range(1, times + 1):
        started = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - started)
    return {"rate": tokens / min(seconds), "first": first, "peak": peak_bytes()}


def _generating(engine: Engine, size: str) -> tuple[Callable[[int], Any], int, int]:
    """Returns what to run, the tokens that count, and how often."""
    rows, _, rest = size.partition("x")
    length, _, new = rest.partition("+")
    batch_size, num_new = int(rows), int(new)

    def run(number: int) -> None:
        ids = engine.generate(make_prompts(batch_size, int(length), number), num_new)
        if [len(row) for row in ids] != [num_new] * batch_size:
            raise RuntimeError(f"Expected {num_new} ids a row, got {[len(row) for row in ids]}.")

    # With one new token, the prompt is the work.
    return run, batch_size * (num_new if num_new > 1 else int(length)), _CALLS


def _training(trainer: Trainer, size: str) -> tuple[Callable[[int], Any], int, int]:
    batch_size, length = map(int, size.split("x"))

    def run(number: int) -> None:
        trainer.step(make_prompts(batch_size, length + 1, number))

    return run, batch_size * length, _STEPS


def peak_bytes() -> float:
    """Returns the most memory that this process has held: of its device, or of the computer."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    jax = sys.modules.get("jax")
    stats = None if jax is None else jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
