"""What the options of `options.py` describe: samplers, tokenizers, models."""

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_llm.generation.prompts import AnyPrompt
    from functional_llm.generation.samplers import Sampler
    from functional_llm.presets import Backbone, TextGenerator, Tokenizer

_FOR_KERAS_ALONE = ("matplotlib", "pandas", "IPython", "requests")
SAMPLER_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def make_sampler(arguments: argparse.Namespace) -> "Sampler":
    """Returns the sampler that the options describe: greedy, unless they have numbers of others."""
    from functional_llm.generation import samplers

    numbers = {name: getattr(arguments, name, None) for name in SAMPLER_NUMBERS}
    return samplers.choose(getattr(arguments, "sampler", None), numbers)


def introduce(preset: str | Path) -> None:
    """Says on a terminal what model a preset's name stands for."""
    from functional_llm.presets.table import preset_names, read_preset

    if sys.stderr.isatty() and preset in preset_names():
        print(f"{preset}: {read_preset(str(preset))['description']}", file=sys.stderr)


@contextmanager
def no_search_for_garbage() -> Iterator[None]:
    """Nothing that is made inside is looked through for garbage, then or later.

    Imports and graphs make a million objects that stay. Python would look at all of them again and
    again: a tenth of the time to the first word.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_keras() -> None:
    """Imports Keras without packages that it imports wherever they are, for what no command does.

    They are for pictures, data frames, notebooks and servers; together they take longer than Keras.
    """
    unneeded = [name for name in _FOR_KERAS_ALONE if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unneeded))  # type: ignore[arg-type]  # Python's own way
    try:
        importlib.import_module("keras")
    finally:
        for name in unneeded:
            del sys.modules[name]


class Model:
    """The model that options name: its base and its adapters, loaded when they are asked for.

    Args:
        arguments: Parsed options of `add_preset`, `add_adapters` and `add_precision`.

    Raises:
        ValueError: If the base of an adapter is not known, or is another.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        with no_search_for_garbage():
            import_keras()
            from functional_llm.presets.adapted import split_handle

        self.base, self.adapters = split_handle(arguments.preset, arguments.adapter or None)
        self._arguments = arguments
        introduce(self.base)

    def load_tokenizer(self) -> "Tokenizer":
        """Returns the model's tokenizer."""
        from functional_llm.presets.adapted import tokenizer_handle
        from functional_llm.presets.tokenizer import Tokenizer

        return Tokenizer.from_preset(tokenizer_handle(self.base, self.adapters))

    def check_prompt(self, tokenizer: "Tokenizer", prompt: "AnyPrompt") -> None:
        """Raises a `ValueError` if prompt and answer do not fit: before the model is loaded."""
        from functional_llm.generation.arguments import check_request
        from functional_llm.generation.prompts import encode_prompt
        from functional_llm.presets.sources import read_numbers

        _, config, _ = read_numbers(self.base)
        size, context = config.vocabulary_size, config.max_sequence_length
        ids = encode_prompt(tokenizer, prompt)
        check_request([ids], self._arguments.max_new_tokens, size, context)

    def load(self) -> "Backbone":
        """Returns the model: quantised and with its adapters, if asked for."""
        from functional_llm.presets import Backbone
        from functional_llm.presets.adapted import with_adapters

        if (axes := getattr(self._arguments, "mesh", None)) is not None:
            distribute(self.base, axes, self._arguments.dtype)
        mode = getattr(self._arguments, "quantize", None)
        dtype = self._arguments.dtype
        with no_search_for_garbage():
            backbone: Any = Backbone.from_preset(self.base, dtype=dtype, quantize=mode)
            return with_adapters(backbone, self.adapters)

    def load_generator(self, tokenizer: "Tokenizer") -> "TextGenerator":
        """Returns a generator with the model."""
        from functional_llm.presets import text_generator

        return text_generator.TextGenerator(self.load(), tokenizer, announce)


def distribute(handle: str | Path, axes: str, dtype: str) -> None:
    """Spreads what is loaded from now on over the devices.

    Args:
        handle: Of the model.
        axes: What `flm.sharding.mesh` takes.
        dtype: Of the weights.
    """
    import keras

    from functional_llm import sharding

    layout = sharding.layout(handle, sharding.mesh(axes), dtype=dtype)
    keras.distribution.set_distribution(layout)


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Says on a terminal that programs are compiled, and takes it back when they are."""
    if not sys.stderr.isatty():
        yield
        return
    # The terminal keeps the place of the cursor, and gets it back.
    print(f"\0337 [compiling {what}, once for each size]", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\0338\033[J", end="", file=sys.stderr, flush=True)
