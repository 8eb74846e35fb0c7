"""What is measured: functions of an engine and the number of the round, run in the worker.

A new measure is a function here, and a line in `MEASURES`. Shapes: B rows, T tokens.
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.base import Engine, Trainer

# Each kind of work has processes of its own, so that none disturbs another or adds to its memory.
WORKS = ("generate", "lora", "train", "compile")
APART = ("lora", "train")  # one precision after the other: together they need over 20 GB
CHECK = "check"
_NEW_TOKENS = 128
_PROMPT_TOKENS = 32
_COMPILED_TOKENS = 16
_TRAINED_ROWS, _TRAINED_TOKENS, _STEPS = 4, 256, 3
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
        run: Function from what `Entry.load` returned for the work, and the number of the round, to
            the figure. Round 0 warms up: it compiles, and does not count.
        more_is_better: Whether a large figure is a good one.
        work: One of `WORKS`.
        once: Whether one round says all.
    """

    title: str
    unit: str
    run: Callable[[Any, int], float]
    more_is_better: bool = True
    work: str = "generate"
    once: bool = False


def make_prompts(batch_size: int, length: int, round_number: int) -> list[list[int]]:
    """Returns (B, T) ids: other ones in each round, the same for every engine.

    Ids from 100 to 500 are frequent words in most vocabularies, and none of the special tokens.
    """
    rng = np.random.default_rng([round_number, batch_size, length])
    return rng.integers(100, 500, (batch_size, length)).tolist()


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


def measure_steps(trainer: Trainer, round_number: int) -> float:
    """Tokens a second of a few steps, each up to the loss on the host."""
    started = time.perf_counter()
    for step in range(_STEPS):
        trainer.step(_training_rows(round_number * _STEPS + step + 1))
    tokens = _STEPS * _TRAINED_ROWS * _TRAINED_TOKENS
    return tokens / (time.perf_counter() - started)


def measure_compile(make: Callable[[Path], Engine], round_number: int, num_layers: int) -> float:
    """Seconds that the first text of a new model takes more than the second one of its length.

    Tracing and compiling, with nothing in a cache; random weights in SmolLM2's sizes.
    """
    with tempfile.TemporaryDirectory(prefix="flm-bench-") as folder:
        write_config(Path(folder), num_layers)
        engine = make(Path(folder))
    prompts = make_prompts(1, _PROMPT_TOKENS, round_number)
    _, first = _timed(engine, prompts, _COMPILED_TOKENS)
    _, second = _timed(engine, prompts, _COMPILED_TOKENS)
    return first - second


def measure_peak_memory(subject: Any, round_number: int) -> float:
    """The most memory the process has held so far, loading and compiling included, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_ids(engine: Engine) -> dict[str, Any]:
    """Greedy ids after fixed texts, to compare engines before anything is timed."""
    return {"ids": [engine.generate([row], _CHECKED_TOKENS)[0] for row in _CHECKED_PROMPTS]}


def check_loss(trainer: Trainer) -> dict[str, Any]:
    """The losses of the first two steps, on the same rows, to compare engines."""
    return {"losses": [trainer.step(_training_rows(0)) for _ in range(2)]}


def write_config(folder: Path, num_layers: int) -> None:
    """Writes the config of a Llama in SmolLM2-135M's sizes, but for the number of layers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "num_hidden_layers": num_layers,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _training_rows(number: int) -> list[list[int]]:
    return make_prompts(_TRAINED_ROWS, _TRAINED_TOKENS + 1, number)


def _timed(engine: Engine, prompts: list[list[int]], num_new: int) -> tuple[Any, float]:
    started = time.perf_counter()
    ids = engine.generate(prompts, num_new)
    return ids, time.perf_counter() - started


CHECKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "generate": check_ids,
    "lora": check_loss,
    "train": check_loss,
}


def _decode(batch_size: int) -> Measure:
    run = partial(measure_decode, batch_size=batch_size)
    return Measure(title=f"decode, batch {batch_size}", unit="tokens/s", run=run)


def _prefill(length: int) -> Measure:
    run = partial(measure_prefill, length=length)
    return Measure(title=f"prefill, {length} tokens", unit="tokens/s", run=run)


def _steps(title: str, work: str) -> Measure:
    return Measure(title=title, unit="tokens/s", run=measure_steps, work=work)


def _memory(title: str, work: str) -> Measure:
    return Measure(
        title=f"peak memory, {title}",
        unit="MB",
        run=measure_peak_memory,
        more_is_better=False,
        work=work,
        once=True,
    )


def _compile(num_layers: int) -> Measure:
    return Measure(
        title=f"compile, {num_layers} layers",
        unit="s",
        run=partial(measure_compile, num_layers=num_layers),
        more_is_better=False,
        work="compile",
    )


# The memory of a kind of work comes after what fills it.
MEASURES = {
    "decode_1": _decode(1),
    "decode_8": _decode(8),
    "decode_32": _decode(32),
    "prefill_32": _prefill(32),
    "prefill_512": _prefill(512),
    "prefill_2048": _prefill(2048),
    "peak_memory": _memory("generation", "generate"),
    "lora_step": _steps("LoRA step", "lora"),
    "lora_memory": _memory("LoRA training", "lora"),
    "train_step": _steps("full training step", "train"),
    "train_memory": _memory("full training", "train"),
    "compile_4": _compile(4),
    "compile_8": _compile(8),
    "compile_16": _compile(16),
    "compile_30": _compile(30),
}
