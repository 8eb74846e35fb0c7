"""Where JAX keeps compiled programs."""

import jax

from functional_llm.formats.download import cache_directory

_CACHE_FOLDER = "jax_compilation_cache_dir"
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def use_compilation_cache() -> None:
    """Keeps compiled programs across processes, unless the user has set a place already.

    JAX keeps what took a second or more to compile. The prefill of a small model takes about as
    long, and would be kept on one machine and made in each process on another.
    """
    if getattr(jax.config, _CACHE_FOLDER) is None:
        jax.config.update(_CACHE_FOLDER, str(cache_directory() / "xla"))
    if getattr(jax.config, _LEAST_SECONDS) == 1.0:
        jax.config.update(_LEAST_SECONDS, 0.1)
