"""A reference zoo of language models for Keras 3 on JAX: every model is one editable graph."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Keras chooses its backend when it is imported, TensorFlow unless told. Whoever imports Keras first
# or sets the variable keeps their choice.
os.environ.setdefault("KERAS_BACKEND", "jax")

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether Python was started for a command, which shall answer before JAX is imported."""
    program = Path(next(iter(getattr(sys, "argv", ())), ""))
    if program.name == "-m":  # as long as Python looks for the module
        return __name__ in sys.orig_argv
    scripts = Path(__file__).parents[1] / "scripts"
    return program.stem == "functional-llm" or program.absolute().parent == scripts


if TYPE_CHECKING or not _is_command():
    # At once, so that Keras can load files with the layers of this library.
    from functional_llm.names import *  # noqa: F403
    from functional_llm.names import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("functional_llm.names"), name)
