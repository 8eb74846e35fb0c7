"""XLA in a hurry: to optimise tiny models takes longer than to run them.

JAX's own setting leaves optimisations out. XLA's newer generator of code for CPUs, which goes
through MLIR, is left out here too: without it a program compiles in half the time (an operation in
0.03 s of a core instead of 0.06 s, a model in 0.3 s instead of 0.7 s).

JAX makes an MLIR context for each program, which takes 4 ms: as long as a small operation itself.
Here one serves all.
"""

import os
from functools import cache
from typing import Any

import jax
from jax._src.interpreters import mlir

_UNOPTIMIZED = "jax_disable_most_optimizations"
_GENERATOR = "xla_cpu_use_fusion_emitters"
_compile_options = jax._src.compiler.get_compile_options
# Where programs are kept, and from how many seconds of compiling on.
KEPT = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# For the processes that a test starts.
ENVIRONMENT = {_UNOPTIMIZED.upper(): "1", "XLA_FLAGS": f"--{_GENERATOR}=false"}


def compile_quickly(quickly: bool) -> None:
    """Says how this process compiles from now on."""
    jax.config.update(_UNOPTIMIZED, quickly)


def _quick_options(*args: Any, **kwargs: Any) -> Any:
    if jax.config.values[_UNOPTIMIZED]:
        overrides = kwargs.get("env_options_overrides") or {}
        kwargs["env_options_overrides"] = {_GENERATOR: False, **overrides}
    return _compile_options(*args, **kwargs)


# XLA reads its own flags once a process, and some tests are of what it makes without them.
jax._src.compiler.get_compile_options = _quick_options
mlir.make_ir_context = cache(mlir.make_ir_context)


def keep_programs(folder: str) -> None:
    """Lets this process and those that it starts keep what takes long to compile.

    `TextGenerator` would do so from the first test on that makes one, beside users' own programs.
    """
    for name, value in zip(KEPT, (folder, 0.1), strict=True):
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)
