"""Backbone and Tokenizer: the only place that knows families, weights and tokenizers together.

Shapes: B batch, T tokens, S slots, V vocabulary.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from functional_llm.backbones.family import Family
from functional_llm.edits.quantization import quantized_paths, with_uninitialized_int8
from functional_llm.files.json_files import read_json, write_json
from functional_llm.files.replacing import replaced
from functional_llm.formats.gguf_file import open_gguf
from functional_llm.formats.hf_config import decode_config, encode_config, write_config
from functional_llm.formats.hf_writer import WEIGHT_FILES, write_safetensors
from functional_llm.formats.weight_table import expand_table, export_weights, module_names
from functional_llm.graph.equality import same_graph
from functional_llm.graph.freezing import Freezable
from functional_llm.graph.keras_private import uninitialized
from functional_llm.layers.call_inputs import as_tensors, complete_inputs
from functional_llm.peft.adapter import origin_of
from functional_llm.peft.serialization import adapters_to_config, attach_from_config
from functional_llm.presets.checkpoint import (
    FAMILIES,
    TOKEN_IDS,
    copy_tokenizer,
    known_family,
    open_checkpoint,
)
from functional_llm.presets.handles import is_preset, locate, read_preset
from functional_llm.stock.keras_file import read_description, unpacked_weights, write_keras_file
from functional_llm.stock.lowering import Lowering, export_stablehlo
from functional_llm.tokenizers import TextTokenizer, save_tokenizer

_DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


@keras.saving.register_keras_serializable("functional_llm")
class Backbone(Freezable, keras.Model):
    """A language model as one functional graph, called with as much or as little as there is.

    ```python
    logits_BTV = backbone(token_ids_BT)
    result = backbone({"token_ids": ids, "cache": cache})   # {"logits": ..., "cache": ...}
    ```

    Optional inputs: `positions` (B, T) int32, -1 for padding, by default 0, 1, 2 ... or, with a
    cache, what follows the tokens in it; `segment_ids` (B, T) int32, for packed examples; `cache`
    from `make_cache` or from an earlier call.

    Args:
        inputs: Symbolic inputs, a dict with all of the above.
        outputs: Symbolic outputs: `logits` (B, T, V), `hidden` (B, T, D), which the head turns
            into logits, and `cache`.
        name: Name of the model.
        config: The family's frozen config that the graph was built from.
    """

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        name: str | None = None,
        *,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)
        self.config = config
        self.preset: str | None = None  # the handle that the weights came from

    @property
    def input_spec(self) -> None:
        """No spec: `call` completes what is missing."""
        return

    @input_spec.setter
    def input_spec(self, value: Any) -> None:
        """Ignored; Keras sets it to None."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(as_tensors(inputs), *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        full = self.complete_inputs(inputs)
        outputs = super().call(full, training=training)
        has_cache = isinstance(inputs, dict) and inputs.get("cache") is not None
        names = ["logits", *(["cache"] if has_cache else [])]
        names += [name for name in outputs if name not in ("logits", "hidden", "cache")]
        return {name: outputs[name] for name in names} if len(names) > 1 else outputs["logits"]

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        # Functional's own crashes at optional inputs that are None.
        return keras.Operation.compute_output_spec(self, inputs, **kwargs)

    def complete_inputs(self, inputs: Any) -> dict[str, Any]:
        """Returns the graph's full dict of inputs: positions filled in, `None` for what is absent.

        Args:
            inputs: Token ids (B, T), or a dict with `token_ids` and any optional inputs.

        Raises:
            ValueError: At an unknown key, a wrong rank, token ids that are no integers or out of
                range, or a cache together with segment ids.
        """
        return complete_inputs(self.input, self.vocabulary_size, inputs)

    @classmethod
    def from_preset(
        cls, handle: str | Path, dtype: str = "float32", load_weights: bool = True
    ) -> Self:
        """Loads a model: config, graph, and weights streamed straight into `dtype`.

        Args:
            handle: A preset's name, a directory in Hugging Face layout, a `.gguf` file, a `.keras`
                file from `save`, or `"hf://org/name"`.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`, or weights in float32 and sums in
                another with `"mixed_bfloat16"` or `"mixed_float16"`.
            load_weights: `False` for random weights; a preset's files are not fetched then.

        Returns:
            A Backbone.

        Raises:
            ValueError: At an unknown preset or family, a config key or tensor that is unknown,
                missing or of a wrong shape, or a damaged file. All differences are named.
            FileNotFoundError: If the path has no such files.
        """
        if not load_weights and is_preset(str(handle)):
            preset = read_preset(str(handle))
            family = known_family(preset["family"], "The preset's family")
            return cls._build(family, decode_config(preset["config"], family), dtype)
        path = locate(handle)
        if path.suffix == ".keras" and path.is_file():
            backbone = cls._from_keras_file(path, dtype, load_weights)
            backbone.preset = str(handle)
            return backbone
        checkpoint = open_checkpoint(path)
        if not load_weights:
            return cls._build(checkpoint.family, checkpoint.config, dtype)
        with uninitialized():
            backbone = cls._build(checkpoint.family, checkpoint.config, dtype)
        checkpoint.load(backbone.variables)
        backbone.preset = str(handle)
        return backbone

    @classmethod
    def _from_keras_file(cls, path: Path, dtype: str, load_weights: bool) -> Self:
        description = read_description(path)
        if description.get("edited", True):
            raise ValueError(
                f"The graph in {path} is not that of its family '{description.get('family')}': it "
                "was rewired. `keras.saving.load_model` loads it as it is. For a Backbone, rewire "
                f"one in the same way again and call `backbone.load_weights('{path}')`."
            )
        family = known_family(description["family"], f"{path}: family")
        config = decode_config(description["config"], family)
        with uninitialized() if load_weights else nullcontext():
            backbone = cls._build(family, config, dtype)
        backbone = with_uninitialized_int8(backbone, description.get("quantized", []))
        if not load_weights:
            return attach_from_config(backbone, description["adapters"])
        adapted = {layer for one in description["adapters"] for layer in one["layers"]}
        for variable in backbone.variables:
            if variable.path.rpartition("/")[0] in adapted:  # methods look at what they adapt
                variable.assign(np.zeros(variable.shape, "float32"))
        backbone = attach_from_config(backbone, description["adapters"])
        backbone.load_weights(path)
        return backbone

    def load_weights(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        """Loads weights into this model, one variable after the other.

        Args:
            filepath: A `.keras` file from `save`, or what stock Keras has saved after loading one;
                or a `.weights.h5` file from `save_weights`.
            *args: As for `keras.Model.load_weights`.
            **kwargs: As for `keras.Model.load_weights`.

        Raises:
            ValueError: If the weights are those of another graph.
        """
        if Path(filepath).suffix != ".keras":
            super().load_weights(filepath, *args, **kwargs)
            return
        with unpacked_weights(Path(filepath)) as weights:
            lowering = Lowering(self)
            lowering.model.load_weights(weights)
            lowering.copy_back()

    def save(
        self,
        filepath: str | Path,
        overwrite: bool = True,
        zipped: bool | None = None,
        *,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        """Writes a `.keras` file of stock layers, which `keras.saving.load_model` loads anywhere.

        Nothing of this library is needed there; see docs/stock_files.md for how to use it.
        `from_preset` makes a Backbone of it again, adapters included. A model that was rewired
        otherwise stays as it is in the file, but comes back through `load_weights` only.

        Args:
            filepath: Where to, with the suffix `.keras`; replaced when the new file is complete.
            overwrite: `False`: a file that is there already is an error.
            zipped: Not `False`: the file is a zip.
            tokenizer: The tokenizer to keep in the file. Defaults to that of the preset that the
                backbone was loaded from, if there is one.

        Raises:
            ValueError: At a layer that stock Keras does not have and that has no lowering (see
                `register_lowering`), or another suffix.
            FileExistsError: Unless `overwrite`, if the file is there.
            OSError: If it cannot be written.
        """
        path = Path(filepath)
        if path.suffix != ".keras" or zipped is False:
            raise ValueError(f"Expected a path that ends in .keras, zipped. Received: {filepath}.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"Expected no file at {path}, or overwrite=True.")
        family = self._family()
        description: dict[str, Any] = {"family": None, "edited": True}
        if family is not None:
            description = {
                "family": family.model_type,
                "edited": not same_graph(self, self._original(family), origin_of),
                "config": encode_config(self.config),
                "quantized": quantized_paths(self, origin_of),
                "adapters": adapters_to_config(self),
            }
        stock = Lowering(self).model
        write_keras_file(stock, path, description, self._tokenizer_files(tokenizer))

    def export(self, filepath: str | Path, format: str = "stablehlo", **kwargs: Any) -> None:
        """Writes the stock model, token ids to logits, for other runtimes.

        Args:
            filepath: Where to.
            format: `"stablehlo"`, for `jax.export.deserialize`, or what `keras.Model.export` can
                with JAX: `"tf_saved_model"` (needs TensorFlow), `"onnx"` (needs jax2onnx). With
                other backends it can more: load a file from `save` there.
            **kwargs: As for `keras.Model.export`.

        Raises:
            ValueError: At a layer that stock Keras does not have and that has no lowering.
            ImportError: If what the format needs is not installed.
        """
        stock = Lowering(self).model
        if format == "stablehlo":
            export_stablehlo(stock, Path(filepath))
            return
        stock(np.zeros((1, 1), "int32"))  # Keras wants it to have been called
        stock.export(str(filepath), format=format, **kwargs)

    def _tokenizer_files(self, tokenizer: TextTokenizer | None) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self._write_tokenizer(tokenizer, Path(folder))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _write_tokenizer(self, tokenizer: TextTokenizer | None, folder: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        elif self.preset is not None:
            copy_tokenizer(locate(self.preset), folder)

    def save_preset(
        self,
        directory: str | Path,
        tokenizer: TextTokenizer | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Writes a directory in Hugging Face layout, which Transformers and `from_preset` load.

        Args:
            directory: Where to write; files of the same names are replaced, all or none.
            tokenizer: The tokenizer to write beside. Defaults to that of the preset that the
                backbone was loaded from, if there is one.
            max_shard_bytes: Largest size of a file of weights.

        Raises:
            ValueError: As `check_preset`.
            OSError: If the directory cannot be written to.
        """
        family = self.check_preset()
        paths = [variable.path for variable in self.variables]
        tensors = expand_table(family.weights, paths, self.config.num_layers)
        dtype = self.variables[0].dtype
        with replaced(Path(directory), stale=WEIGHT_FILES) as folder:
            write_safetensors(folder, export_weights(self.variables, tensors), max_shard_bytes)
            self._write_tokenizer(tokenizer, folder)
            ids = read_json(folder / "generation_config.json", {})
            ids = {key: ids[key] for key in TOKEN_IDS if key in ids}
            write_json(folder / "config.json", write_config(self.config, family, dtype) | ids)

    def check_preset(self) -> Family:
        """Returns the family, if the graph is what the config promises.

        Raises:
            ValueError: If the config is of no known family, or the graph has other weights, as with
                adapters that are not merged, or layers that were dropped (all are named), or it
                was rewired in another way.
        """
        family = self._family()
        if family is None:
            raise ValueError(
                f"Expected a backbone with the config of a known family ({', '.join(FAMILIES)}). "
                f"Received: config={self.config!r}."
            )
        plain = self._original(family)
        expected = {v.path: tuple(v.shape) for v in plain.variables}
        received = {v.path: tuple(v.shape) for v in self.variables}
        problems = [
            f"'{path}': expected {expected.get(path, 'no such weight')}, received "
            f"{received.get(path, 'none')}"
            for path in sorted(expected.keys() | received.keys())
            if expected.get(path) != received.get(path)
        ]
        if problems:
            raise ValueError(
                f"The model does not fit its config, {len(problems)} differences:\n  "
                + "\n  ".join(problems[:20])
                + "\nA directory would lose them. Merge adapters; save those that add weights, as "
                "biases, with `flm.peft.save_adapter`."
            )
        if not same_graph(self, plain):
            raise ValueError(
                f"The model was rewired: its graph is not that of '{family.model_type}', which is "
                "all that a directory can say. Save it as a .keras file with `save`, graph and all."
            )
        return family

    def _original(self, family: Family) -> Self:
        """The family's graph for this config, without values."""
        with uninitialized():
            return self._build(family, self.config, "float32")

    @classmethod
    def _build(cls, family: Family, config: Any, dtype: str) -> Self:
        with _dtype_policy(dtype):
            inputs, outputs = family.build(config)
            return cls(inputs, outputs, name=family.model_type, config=config)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.output["logits"].shape[-1]

    @property
    def module_names(self) -> dict[str, str]:
        """Path of each Dense -> name of the module in the family's checkpoints."""
        family = self._family()
        return {} if family is None else module_names(family.weights, self.config.num_layers)

    def _family(self) -> Family | None:
        fitting = (f for f in FAMILIES.values() if isinstance(self.config, f.config_class))
        return next(fitting, None)


class Tokenizer(TextTokenizer):
    """Text <-> ids."""

    @classmethod
    def from_preset(cls, handle: str | Path) -> Self:
        """Loads the tokenizer that belongs to a model.

        Args:
            handle: As for `Backbone.from_preset`.

        Raises:
            ValueError: At an unknown preset, or a tokenizer that is damaged or of an unknown kind.
            FileNotFoundError: If the path has no such files.
        """
        path = locate(handle)
        if path.suffix == ".keras" and path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                copy_tokenizer(path, Path(folder))
                return cls.from_directory(Path(folder))
        if path.is_file():
            return cls.from_gguf_metadata(open_gguf(path).metadata)
        return cls.from_directory(path)


@contextmanager
def _dtype_policy(dtype: str) -> Iterator[None]:
    """Builds layers in a dtype; the configs of parts need not carry it."""
    if dtype not in _DTYPES and not isinstance(dtype, keras.DTypePolicy):
        raise ValueError(f"Expected dtype to be one of {', '.join(_DTYPES)}, received {dtype!r}.")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
