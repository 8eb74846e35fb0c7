"""Memory of a training step: what it frees and needs again, and how much it is."""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import keras

from functional_llm.graph.keeping_values import TRAINED
from functional_llm.graph.keras_values import StepOfGroups

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


@dataclass(frozen=True)
class StepMemory:
    """What a training step takes of a device's memory, as XLA has laid it out, in bytes.

    Args:
        state: Weights, the optimizer's variables and the batch: what goes into the program.
        results: What comes out of it and is not written over what went in.
        temporary: What a step needs between: activations, gradients, logits.
        code: The program itself.
        limit: What the device has, less what others hold of it; `None` where nobody knows.
        program: The jitted step. While it lives, Keras finds its program compiled.
    """

    state: int
    results: int
    temporary: int
    code: int = 0
    limit: int | None = None
    program: Any = field(default=None, repr=False, compare=False)

    @property
    def peak(self) -> int:
        """The most that is held at one time."""
        return self.state + self.results + self.temporary + self.code

    def describe(self) -> str:
        """Returns the numbers in one line."""
        limit = "" if self.limit is None else f" of {_gigabytes(self.limit)}"
        return (
            f"Memory of a step: {_gigabytes(self.peak)}{limit} (estimate: weights and optimizer "
            f"{_gigabytes(self.state)}, activations and gradients {_gigabytes(self.temporary)})"
        )

    def check(self, advice: str) -> None:
        """Raises an error if the device has less.

        Args:
            advice: What may be done, a sentence.

        Raises:
            ValueError: If it does not fit.
        """
        if self.limit is not None and self.peak > self.limit:
            raise ValueError(
                f"Expected a training step that fits into {_gigabytes(self.limit)}, received one "
                f"of about {_gigabytes(self.peak)}: {_gigabytes(self.state)} of weights and "
                f"optimizer, {_gigabytes(self.temporary)} of activations and gradients. {advice}"
            )


def predict_memory(model: keras.Model, batch: Any) -> StepMemory | None:
    """Compiles a training step, and returns what it will take; it runs nothing.

    XLA knows before a program runs where it puts what. Python, JAX and the data are not counted:
    about 0.5 GB of a computer's memory, and none of a GPU's. On a CPU, four layers of SmolLM2 with
    LoRA grew by 0.86 and 1.66 GB in a step of 4 and 8 rows of 512; 0.77 and 1.59 GB are predicted.

    Args:
        model: A compiled LossModel.
        batch: One batch: inputs, labels, weights.

    Returns:
        The memory; `None` if the model is spread over several devices, or its steps are not
        compiled.
    """
    is_spread = keras.distribution.distribution() is not None
    if is_spread or model.run_eagerly or not model.jit_compile:
        return None
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([_shape_of(variable.value) for variable in group] for group in groups)
    step = StepOfGroups(model.train_step, TRAINED)
    program = jax.jit(step, donate_argnums=0)
    shapes = (*step.split(state), jax.tree.map(_shape_of, batch))
    used = program.lower(*shapes).compile().memory_analysis()
    if used is None:
        return None
    return StepMemory(
        state=used.argument_size_in_bytes,
        results=used.output_size_in_bytes - used.alias_size_in_bytes,
        temporary=used.temp_size_in_bytes,
        code=used.generated_code_size_in_bytes,
        limit=_limit(used.argument_size_in_bytes),
        program=program,
    )


def advise(batch_size: int, remat: str, dtype: str) -> str:
    """Returns what makes a step smaller, of what is not done yet.

    Args:
        batch_size: Rows of a batch.
        remat: One of `REMAT`.
        dtype: That the model computes in.
    """
    ways = ["shorter rows"]
    if batch_size > 1:
        ways.insert(0, f"a smaller batch than {batch_size} rows")
    if remat != "layer":
        ways.append('remat="layer"' if remat == "products" else 'remat="products" or "layer"')
    if dtype == "float32":
        ways.append("bfloat16 (mixed_bfloat16 to train all weights)")
    return f"Try {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _limit(own: int) -> int | None:
    """Returns the bytes that a step may take: a device's, less what is there already.

    Args:
        own: What of that goes into the step.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - own))
    if device.platform != "cpu":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # of a container; "max" if it has none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
