"""Exports of the stock model for other runtimes."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np

from functional_llm.graph.precision import full_float32
from functional_llm.layers.long_texts import turning_lengths
from functional_llm.stock.keras_file import write_keras_file
from functional_llm.stock.lowering import Lowering
from functional_llm.stock.stablehlo import export_stablehlo
from functional_llm.tokenizers import TextTokenizer

_PROGRAM = "functional_llm.stock.text_model"
# What the program finds in its folder, and what it leaves there if it refuses the tokenizer.
MODEL, TOKENIZER, OPTIONS, REFUSED = "model.keras", "tokenizer.pickle", "options.json", "refused"


class Exportable:
    """A mixin for models: `export` writes what they are lowered to. Put it before `keras.Model`."""

    def export(
        self,
        filepath: str | Path,
        format: str = "stablehlo",
        *,
        tokenizer: TextTokenizer | None = None,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        """Writes the stock model for other runtimes: token ids to logits, or text to text.

        Args:
            filepath: Where to.
            format: `"stablehlo"`, for `jax.export.deserialize`, or what `keras.Model.export` can
                with JAX: `"tf_saved_model"` (needs TensorFlow), `"onnx"` (needs jax2onnx). With
                other backends it can more: load a file from `save` there.
            tokenizer: With `"tf_saved_model"`: the SavedModel takes prompts, a vector of strings,
                and returns what `TextGenerator.generate` would write, greedily, under "texts".
            max_new_tokens: Most tokens that it writes then.
            **kwargs: As for `keras.Model.export`.

        Raises:
            ValueError: At a layer that stock Keras does not have and that has no lowering, or a
                tokenizer that cannot be in a graph (see `TextTokenizer.as_tf`).
            ImportError: If what the format needs is not installed.
        """
        model: Any = self
        if tokenizer is not None:
            if format != "tf_saved_model" or kwargs:
                raise ValueError(
                    'Expected a tokenizer with format="tf_saved_model" and without other options: '
                    f"no other format has strings. Received: format={format!r}, {kwargs}."
                )
            context = getattr(getattr(model, "config", None), "max_sequence_length", None)
            # The loop in a SavedModel reads no text again.
            context = min([*turning_lengths(model), *([context] if context else [])], default=None)
            export_text_model(model, Path(filepath), tokenizer, max_new_tokens, context)
            return
        stock = Lowering(model).model
        if format == "stablehlo":
            with full_float32(model.product_dtype):
                export_stablehlo(stock, Path(filepath))
            return
        stock(np.zeros((1, 1), "int32"))  # Keras wants it to have been called
        stock.export(str(filepath), format=format, **kwargs)


def export_text_model(
    model: keras.Model,
    path: Path,
    tokenizer: TextTokenizer,
    max_new_tokens: int,
    context: int | None,
) -> None:
    """Writes a SavedModel from strings to strings.

    Keras has one backend in a process: another one, on the CPU, reads the stock file and writes the
    operations of TensorFlow.

    Args:
        model: A Backbone, or any functional model with its inputs and outputs.
        path: The folder to write.
        tokenizer: The model's tokenizer.
        max_new_tokens: Most tokens to write.
        context: Most tokens of a prompt and its text together; `None` if there is no limit.

    Raises:
        ValueError: At a layer that stock Keras does not have and that has no lowering, a tokenizer
            that cannot be in a graph, or fewer than one new token.
        ImportError: If TensorFlow or tensorflow-text is not installed.
        RuntimeError: If the other process fails.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"Expected max_new_tokens of at least 1, received {max_new_tokens!r}.")
    missing = [name for name in ("tensorflow", "tensorflow_text") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"A SavedModel with a tokenizer needs {' and '.join(missing)}, which is not installed. "
            "Install it with `pip install tensorflow-text`."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_keras_file(Lowering(model).model, folder / MODEL, {}, {})
        (folder / TOKENIZER).write_bytes(pickle.dumps(tokenizer))
        options = {"max_new_tokens": max_new_tokens, "context": context}
        (folder / OPTIONS).write_text(json.dumps(options), "utf-8")
        own = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
        own["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        run = subprocess.run(
            [sys.executable, "-P", "-m", _PROGRAM, name, str(path.absolute())],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | own,
            capture_output=True,
            text=True,
        )
        refused = folder / REFUSED
        if refused.exists():
            raise ValueError(refused.read_text("utf-8"))
    if run.returncode != 0:
        raise RuntimeError(f"TensorFlow could not write {path}:\n{run.stderr[-3000:]}")
