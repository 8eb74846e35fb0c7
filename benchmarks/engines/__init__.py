"""The engines that take part. A new one is a file with an `Engine` in this folder, and a line here.

Nothing is imported before its worker runs: every engine lives in a process of its own.
"""

import importlib
from dataclasses import dataclass

from benchmarks.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where an engine is, and what it can be measured in.

    Args:
        module: Module in this folder.
        cls: Class in the module.
        precisions: Precisions it knows.
        packages: Distributions whose versions belong to a result.
        script: Command, after `python`, that loads the model and prints its first token, by which
            the time from process start is measured. Defaults to `benchmarks/first_token.py`.
    """

    module: str
    cls: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    script: tuple[str, ...] = ()

    def load(self) -> type[Engine]:
        """Imports the engine: only in its own process."""
        return getattr(importlib.import_module(f"benchmarks.engines.{self.module}"), self.cls)


ENGINES = {
    "functional_llm": Entry(
        module="ours",
        cls="FunctionalLLM",
        precisions=("float32", "bfloat16"),
        packages=("functional-llm", "keras", "jax"),
        script=("scripts/generate.py", "--max-new-tokens", "2", "--dtype", "{precision}"),
    ),
    "keras_hub": Entry(
        module="keras_hub_jax",
        cls="KerasHub",
        precisions=("float32", "bfloat16"),
        packages=("keras-hub", "keras", "jax"),
    ),
    "transformers": Entry(
        module="hf_transformers",
        cls="Transformers",
        precisions=("float32", "bfloat16"),
        packages=("transformers", "torch"),
    ),
}
