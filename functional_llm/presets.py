"""Backbone and Tokenizer: the only place that knows families, weights and tokenizers together.

Shapes: B batch, T tokens, S slots, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import keras
from keras import ops, tree
from tqdm import tqdm

from functional_llm.backbones import llama
from functional_llm.convert.gguf import GGUFFile, open_gguf
from functional_llm.convert.gguf_checkpoint import GGUFCheckpoint, read_raw_config
from functional_llm.convert.huggingface import read_config
from functional_llm.convert.safetensors import open_safetensors
from functional_llm.convert.table import (
    TensorSource,
    check_source,
    expand_table,
    load_weights,
    module_names,
    uninitialized,
)
from functional_llm.freezing import Freezable
from functional_llm.handles import is_preset, locate, read_preset
from functional_llm.tokenizers import TextTokenizer

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
}


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
        if len(token_ids.shape) != 2 or not keras.backend.is_int_dtype(token_ids.dtype):
            raise ValueError(
                f"Expected token_ids of shape (batch, tokens) and an integer dtype, received shape "
                f"{tuple(token_ids.shape)} and dtype {token_ids.dtype}."
            )
        return ops.cast(token_ids, "int32")

    @classmethod
    def from_preset(
        cls, handle: str | Path, dtype: str = "float32", load_weights: bool = True
    ) -> Self:
        """Loads a model: config, graph, and weights streamed straight into `dtype`.

        Args:
            handle: A preset's name, a directory in Hugging Face layout, a `.gguf` file, or
                `"hf://org/name"`.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, or another Keras dtype policy.
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
            family = _family(preset["family"], preset["family"])
            return cls._build(family, family.Config(**preset["config"]), dtype)
        checkpoint = _open_checkpoint(locate(handle))
        if not load_weights:
            return cls._build(checkpoint.family, checkpoint.config, dtype)
        with uninitialized():
            backbone = cls._build(checkpoint.family, checkpoint.config, dtype)
        checkpoint.load(backbone.variables)
        return backbone

    @classmethod
    def _build(cls, family: ModuleType, config: Any, dtype: str) -> Self:
        with _dtype_policy(dtype):
            inputs, outputs = family.build(config)
            return cls(inputs, outputs, config=config)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.output["logits"].shape[-1]

    @property
    def module_names(self) -> dict[str, str]:
        """Path of each Dense -> name of the module in the family's checkpoints."""
        for family in FAMILIES.values():
            if isinstance(self.config, family.Config):
                return module_names(family.WEIGHTS, self.config.num_layers)
        return {}


def _as_tensor(x: Any) -> Any:
    """Keras refuses a mixture of numpy arrays and tensors."""
    return x if x is None or isinstance(x, keras.KerasTensor) else ops.convert_to_tensor(x)


def _default_positions(token_ids: Any, cache: Any) -> Any:
    batch, length = ops.shape(token_ids)
    positions_1T = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
    if cache is None:
        return ops.broadcast_to(positions_1T, (batch, length))
    return ops.max(cache["positions"], axis=1, keepdims=True) + 1 + positions_1T


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
        if path.is_file():
            return cls.from_gguf_metadata(open_gguf(path).metadata)
        return cls.from_directory(path)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose config is read, and whose tensors are not."""

    family: ModuleType
    config: Any
    open_tensors: Callable[[list[str]], TensorSource]

    def load(self, variables: list[keras.Variable]) -> None:
        rows = expand_table(
            self.family.WEIGHTS, [variable.path for variable in variables], self.config.num_layers
        )
        source = self.open_tensors([name for name, _, _ in rows.values()])
        ignored = list(self.family.IGNORED)
        if self.config.tie_word_embeddings:
            ignored += self.family.IGNORED_IF_TIED
        check_source(rows, {v.path: v.shape for v in variables}, source, ignored)
        load_weights(variables, rows, source, _progress_bar)


def _open_checkpoint(path: Path) -> _Checkpoint:
    if path.is_file():
        return _open_gguf_checkpoint(open_gguf(path))
    raw = _read_json(path / "config.json")
    family = _family(raw.get("model_type"), f"{path / 'config.json'}: model_type")
    config = read_config(raw, family.Config, family.CONFIG_KEYS, family.config_defaults)
    return _Checkpoint(family, config, lambda names: open_safetensors(path))


def _open_gguf_checkpoint(file: GGUFFile) -> _Checkpoint:
    # llama.cpp's names of architectures are Hugging Face's model types, as far as the zoo goes.
    architecture = file.metadata.get("general.architecture")
    family = _family(architecture, f"{file.path}: general.architecture")
    raw = read_raw_config(file)
    config = read_config(raw, family.Config, family.CONFIG_KEYS, family.config_defaults)
    permuted = {name: getattr(config, field) for name, field in family.GGUF_PERMUTED.items()}
    return _Checkpoint(
        family, config, lambda names: GGUFCheckpoint(file, names, config.num_layers, permuted)
    )


def _family(name: Any, where: str) -> ModuleType:
    if name not in FAMILIES:
        raise ValueError(f"{where} is {name!r}. Known families: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def _read_json(path: Path) -> dict[str, Any]:
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
