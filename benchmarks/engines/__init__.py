"""The engines that take part. A new one is a file with an `Engine` in this folder, and a line here.

Nothing is imported before its worker runs: every engine lives in a process of its own.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where an engine is, and what it can be measured in.

    Args:
        module: Module in this folder.
        cls: `Engine` in the module.
        precisions: Precisions it knows.
        packages: Distributions whose versions belong to a result.
        script: Command, after `python`, that loads the model and prints its first token, by which
            the time from process start is measured. Defaults to `benchmarks/first_token.py`.
        script_options: What to tell the script besides, for each precision.
        trainer: `Trainer` in the module, if it can train.
        trainer_precisions: Precisions it can train in.
        compiles: Whether it compiles a program for each model.
    """

    module: str
    cls: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    script: tuple[str, ...] = ()
    script_options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trainer: str | None = None
    trainer_precisions: tuple[str, ...] = ()
    compiles: bool = False

    def does(self, work: str, precision: str) -> bool:
        """Returns whether the engine can be measured at this work (see `measures.WORKS`)."""
        if work in ("lora", "train"):
            return precision in self.trainer_precisions
        return precision in self.precisions and (work == "generate" or self.compiles)

    def load(self, work: str, weights: Path, precision: str) -> Any:
        """Imports the engine, only in its own process; returns what the measures ask.

        An `Engine`; to train, a `Trainer`; to compile, a function from a directory to an `Engine`
        with random weights.
        """
        module = importlib.import_module(f"benchmarks.engines.{self.module}")
        if work in ("lora", "train"):
            return getattr(module, str(self.trainer))(weights, precision, lora=work == "lora")
        make: Callable[..., Any] = getattr(module, self.cls)
        if work == "compile":
            return partial(make, precision=precision, load_weights=False)
        return make(weights, precision)


ENGINES = {
    "functional_llm": Entry(
        module="ours",
        cls="FunctionalLLM",
        precisions=("float32", "bfloat16", "int8"),
        packages=("functional-llm", "keras", "jax"),
        script=("scripts/generate.py", "--max-new-tokens", "2"),
        script_options={
            "float32": ("--dtype", "float32"),
            "bfloat16": ("--dtype", "bfloat16"),
            "int8": ("--dtype", "bfloat16", "--quantize", "int8"),
        },
        trainer="FunctionalLLMTrainer",
        trainer_precisions=("float32", "bfloat16"),
        compiles=True,
    ),
    "keras_hub": Entry(
        module="keras_hub_jax",
        cls="KerasHub",
        precisions=("float32", "bfloat16"),
        packages=("keras-hub", "keras", "jax"),
        trainer="KerasHubTrainer",
        trainer_precisions=("float32", "bfloat16"),
        compiles=True,
    ),
    "transformers": Entry(
        module="hf_transformers",
        cls="Transformers",
        precisions=("float32", "bfloat16"),
        packages=("transformers", "peft", "torch"),
        trainer="TransformersTrainer",
        trainer_precisions=("float32", "bfloat16"),
    ),
    "llama_cpp": Entry(
        module="llama_cpp",
        cls="LlamaCpp",
        precisions=("float32", "bfloat16", "float16", "int8"),
        packages=("xllamacpp",),
    ),
    "ctranslate2": Entry(
        module="ctranslate",
        cls="CTranslate2",
        precisions=("float32", "int8"),
        packages=("ctranslate2",),
    ),
}
