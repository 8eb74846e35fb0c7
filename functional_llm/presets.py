"""Backbone and Tokenizer: the only place that knows families, weights and tokenizers together.

Shapes: B batch, T tokens, S slots, V vocabulary.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree
from tqdm import tqdm

from functional_llm.backbones import gemma, gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3
from functional_llm.cache import latest_position
from functional_llm.comparing import same_graph
from functional_llm.convert.gguf import GGUFFile, open_gguf
from functional_llm.convert.gguf_checkpoint import GGUFCheckpoint, read_raw_config
from functional_llm.convert.huggingface import (
    decode_config,
    encode_config,
    read_config,
    write_config,
)
from functional_llm.convert.keras_file import (
    read_description,
    read_tokenizer,
    unpacked_weights,
    write_keras_file,
)
from functional_llm.convert.safetensors import open_safetensors
from functional_llm.convert.saving import replaced, write_json, write_safetensors
from functional_llm.convert.table import (
    TensorSource,
    check_copies,
    check_source,
    expand_table,
    export_weights,
    load_weights,
    module_names,
    uninitialized,
    with_prefix,
)
from functional_llm.export import Lowering
from functional_llm.family import Family
from functional_llm.freezing import Freezable
from functional_llm.handles import is_preset, locate, read_preset
from functional_llm.peft.adapter import Adapter
from functional_llm.peft.describing import attach_described, describe_adapters
from functional_llm.tokenizers import TextTokenizer, save_tokenizer

_DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
_MODULES = (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, gpt2)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


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
        return super().__call__(tree.map_structure(_as_tensor, inputs), *args, **kwargs)

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
        given = dict(inputs) if isinstance(inputs, dict) else {"token_ids": inputs}
        names = list(self.input)
        unknown = sorted(set(given) - set(names))
        if unknown or given.get("token_ids") is None:
            raise ValueError(f"Expected token_ids and any of {names}, received {sorted(given)}.")
        token_ids = self._check_tokens(given["token_ids"])
        cache = given.get("cache")
        if cache is not None and given.get("segment_ids") is not None:
            raise ValueError(
                "Expected `segment_ids` or `cache`, received both: a cache does not keep the "
                "segments of its tokens. Pack examples for training, without a cache."
            )
        positions = given.get("positions")
        self._check_beside(token_ids, positions, cache)
        if positions is None:
            positions = _default_positions(token_ids, cache)
        empty = tree.map_structure(lambda _: None, self.input["cache"])
        return {
            "token_ids": token_ids,
            "positions": positions,
            "segment_ids": given.get("segment_ids"),
            "cache": empty if cache is None else cache,
        }

    def _check_tokens(self, token_ids: Any) -> Any:
        shape, dtype = getattr(token_ids, "shape", ()), getattr(token_ids, "dtype", None)
        if len(shape) != 2 or not keras.backend.is_int_dtype(dtype):
            raise ValueError(
                "Expected token_ids, an array of shape (batch, tokens) and an integer dtype, "
                f"received a {type(token_ids).__name__} of shape {tuple(shape)}, dtype {dtype}."
            )
        numbers = _numbers(token_ids)
        if numbers is not None and numbers.size:
            lowest, highest = int(numbers.min()), int(numbers.max())
            if lowest < 0 or highest >= self.vocabulary_size:
                raise ValueError(
                    f"Expected token ids from 0 to {self.vocabulary_size - 1}, received ids from "
                    f"{lowest} to {highest}."
                )
        return ops.cast(token_ids, "int32")

    def _check_beside(self, token_ids: Any, positions: Any, cache: Any) -> None:
        """Compares what comes along with the token ids."""
        shape = tuple(token_ids.shape)
        if positions is not None and tuple(positions.shape) != shape:
            raise ValueError(
                f"Expected positions of the shape of token_ids, {shape}, received "
                f"{tuple(positions.shape)}."
            )
        if cache is None:
            return
        same = isinstance(cache, dict) and set(cache) == set(self.input["cache"])
        rows = next(iter(cache.values()))["positions"].shape[0] if same else None
        if rows is None or None not in (rows, shape[0]) and rows != shape[0]:
            raise ValueError(
                f"Expected a cache of `make_cache` or of an earlier call, for {shape[0]} rows, "
                f"received one for {rows} with the keys {sorted(cache)}."
            )

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
            family = _known_family(FAMILIES, preset["family"], "The preset's family")
            return cls._build(family, decode_config(preset["config"], family), dtype)
        path = locate(handle)
        if path.suffix == ".keras" and path.is_file():
            backbone = cls._from_keras_file(path, dtype, load_weights)
            backbone.preset = str(handle)
            return backbone
        checkpoint = _open_checkpoint(path)
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
        if description["edited"]:
            raise ValueError(
                f"The graph in {path} is not that of its family '{description['family']}': it was "
                "rewired. `keras.saving.load_model` loads it as it is. For a Backbone, rewire one "
                f"in the same way again and call `backbone.load_weights('{path}')`."
            )
        family = _known_family(FAMILIES, description["family"], f"{path}: family")
        config = decode_config(description["config"], family)
        if not load_weights:
            return attach_described(cls._build(family, config, dtype), description["adapters"])
        with uninitialized():
            backbone = cls._build(family, config, dtype)
        adapted = {layer for one in description["adapters"] for layer in one["layers"]}
        for variable in backbone.variables:
            if variable.path.rpartition("/")[0] in adapted:  # methods look at what they adapt
                variable.assign(np.zeros(variable.shape, "float32"))
        backbone = attach_described(backbone, description["adapters"])
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
            with uninitialized():
                original = self._build(family, self.config, "float32")
            description = {
                "family": family.model_type,
                "edited": not same_graph(self, original, _without_adapters),
                "config": encode_config(self.config),
                "adapters": describe_adapters(self),
            }
        stock = Lowering(self).model
        write_keras_file(stock, path, description, self._tokenizer_files(tokenizer))

    def _tokenizer_files(self, tokenizer: TextTokenizer | None) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self._write_tokenizer(tokenizer, Path(folder))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _write_tokenizer(self, tokenizer: TextTokenizer | None, folder: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        elif self.preset is not None:
            _copy_tokenizer(locate(self.preset), folder)

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
        with replaced(Path(directory)) as folder:
            write_safetensors(folder, export_weights(self.variables, tensors), max_shard_bytes)
            self._write_tokenizer(tokenizer, folder)
            ids = _read_json(folder / "generation_config.json", {})
            ids = {key: ids[key] for key in _TOKEN_IDS if key in ids}
            write_json(folder / "config.json", write_config(self.config, family, dtype) | ids)

    def check_preset(self) -> Family:
        """Returns the family, if the graph has the weights that its config promises.

        Raises:
            ValueError: If the config is of no known family, or the graph has other weights, as with
                adapters that are not merged, or layers that were dropped. All are named.
        """
        family = self._family()
        if family is None:
            raise ValueError(
                f"Expected a backbone with the config of a known family ({', '.join(FAMILIES)}). "
                f"Received: config={self.config!r}."
            )
        with uninitialized():
            plain = self._build(family, self.config, "float32")
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
        return family

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


def _without_adapters(layer: Any) -> Any:
    return layer.origin if isinstance(layer, Adapter) else layer


def _as_tensor(x: Any) -> Any:
    """Keras refuses a mixture of numpy arrays and tensors."""
    return x if x is None or isinstance(x, keras.KerasTensor) else ops.convert_to_tensor(x)


def _numbers(x: Any) -> np.ndarray | None:
    """The numbers of an array; `None` where only its shape is known."""
    if isinstance(x, keras.KerasTensor):
        return None
    try:
        return ops.convert_to_numpy(x)
    except (TypeError, NotImplementedError, RuntimeError):  # traced by a compiler
        return None


def _default_positions(token_ids: Any, cache: Any) -> Any:
    batch, length = ops.shape(token_ids)
    positions_1T = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
    if cache is None:
        return ops.broadcast_to(positions_1T, (batch, length))
    return ops.expand_dims(latest_position(cache), 1) + 1 + positions_1T


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
                _copy_tokenizer(path, Path(folder))
                return cls.from_directory(Path(folder))
        if path.is_file():
            return cls.from_gguf_metadata(open_gguf(path).metadata)
        return cls.from_directory(path)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose config is read, and whose tensors are not."""

    family: Family
    config: Any
    open_tensors: Callable[[list[str]], TensorSource]

    def load(self, variables: list[keras.Variable]) -> None:
        family, config = self.family, self.config
        tensors = expand_table(family.weights, [v.path for v in variables], config.num_layers)
        source = self.open_tensors([tensor.name for tensor in tensors])
        embedding = next(t.name for t in tensors if t.paths == ("token_embedding/embeddings",))
        # A file may hold the head though it is the embedding.
        copies = {"lm_head.weight": embedding} if config.tie_word_embeddings else {}
        ignored = [*family.ignored, *copies]
        check_source(tensors, {v.path: tuple(v.shape) for v in variables}, source, ignored)
        load_weights(variables, tensors, source, _progress_bar)
        check_copies(copies, variables, tensors, source)


def _open_checkpoint(path: Path) -> _Checkpoint:
    if path.is_file():
        return _open_gguf_checkpoint(open_gguf(path))
    raw = _read_json(path / "config.json")
    family = _known_family(FAMILIES, raw.get("model_type"), f"{path / 'config.json'}: model_type")

    def open_tensors(names: list[str]) -> TensorSource:
        return with_prefix(open_safetensors(path), family.base_prefix, names)

    return _Checkpoint(family, read_config(raw, family), open_tensors)


def _open_gguf_checkpoint(file: GGUFFile) -> _Checkpoint:
    families = {f.gguf_architecture: f for f in FAMILIES.values() if f.gguf_architecture}
    architecture = file.metadata.get("general.architecture")
    family = _known_family(families, architecture, f"{file.path}: general.architecture")
    config = read_config(read_raw_config(file, family), family)
    return _Checkpoint(family, config, lambda names: GGUFCheckpoint(file, names, family, config))


def _known_family(families: Mapping[str, Family], name: Any, where: str) -> Family:
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"{where} is {name!r}. Known families: {', '.join(sorted(families))}.")
    return families[name]


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def _copy_tokenizer(path: Path, folder: Path) -> None:
    """Copies the tokenizer's files of a directory or .keras file, or writes that of a GGUF file."""
    if path.suffix == ".keras" and path.is_file():
        for name, content in read_tokenizer(path).items():
            (folder / name).write_bytes(content)
        return
    if path.is_file():
        save_tokenizer(Tokenizer.from_preset(path), folder)
        return
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if not path.is_file() and default is not None:
        return default
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path.name} in {path.parent}: it is not there.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, received {type(raw).__name__}.")
    return raw


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


def _progress_bar(items: Iterator[Any], total: int) -> Iterator[Any]:
    # On a terminal only (`disable=None`).
    return iter(
        tqdm(items, total=total, desc="Loading weights", unit="tensor", leave=False, disable=None)
    )
