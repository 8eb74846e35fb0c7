"""Preset directories of KerasHub, read without KerasHub and without TensorFlow."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.keras_hub.column import HEAD
from functional_llm.backbones.transforms import Rows
from functional_llm.files.json_files import read_json
from functional_llm.formats.keras_hub_config import read_arguments
from functional_llm.formats.keras_hub_weights import RANDOM_STATES, KerasHubFiles, numbered
from functional_llm.formats.source import Source
from functional_llm.formats.tensor_source import TensorSource
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer, save_tokenizer

_CONFIG, _TASK, _TOKENIZER = "config.json", "task.json", "tokenizer.json"
_FLOATS = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
_Tokenizer = TypeVar("_Tokenizer", bound=TextTokenizer)


class KerasHubPreset(Source):
    """A directory with `config.json`, `model.weights.h5` and a tokenizer, as KerasHub saves it."""

    suffix = ""
    words = "a KerasHub preset directory"

    @classmethod
    def opens(cls, path: Path) -> bool:
        # The tokenizer is read only if there is no model: that of others takes a tenth of a second.
        files = (path / name for name in (_CONFIG, _TOKENIZER))
        return _is_serialized(next((file for file in files if file.is_file()), path / _CONFIG))

    @cached_property
    def _files(self) -> KerasHubFiles:
        return KerasHubFiles(self.path)

    @cached_property
    def _raw(self) -> JSON:
        return read_json(self.path / _CONFIG)

    @cached_property
    def _read(self) -> tuple[Family, ModelConfig]:
        raw, where = self._raw, str(self.path / _CONFIG)
        arguments = raw["config"]
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}: expected the arguments of a class under config.")
        task = read_json(self.path / _TASK, {}).get("class_name", "CausalLM")
        family, config = read_arguments(
            raw["class_name"], arguments, HEAD in self._files.shapes, self.families, where
        )
        if not str(task).endswith("CausalLM"):
            raise ValueError(
                f"{self.path / _TASK}: expected the task of a model that writes text (CausalLM). "
                f"Received: {task!r}, whose own weights would be lost."
            )
        if (dtype := _dtype(arguments.get("dtype"))) not in _FLOATS:
            raise ValueError(
                f"{where}: expected weights in floating point ({', '.join(_FLOATS)}). Received: "
                f"{dtype!r}. Load the preset with KerasHub, without quantizing it, and save it."
            )
        return family, config

    @property
    def family(self) -> Family:
        return self._read[0]

    @property
    def config(self) -> ModelConfig:
        return self._read[1]

    @property
    def rows(self) -> Rows:
        column = self.family.keras_hub
        return [] if column is None else column.weights(self.config)

    @property
    def ignored(self) -> Sequence[str]:
        column = self.family.keras_hub
        if column is None:
            return [RANDOM_STATES]
        computed = [place.replace("_{}", "*") for place in column.computed(self.config)]
        encoders = column.encoder_places(self._raw["config"])
        return [RANDOM_STATES, *computed, *(f"{place}/*" for place in encoders)]

    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        return numbered(self._files, names)

    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        return cls.from_keras_hub_preset(self.path)

    def write_tokenizer(self, folder: Path) -> None:
        if (self.path / _TOKENIZER).is_file():
            save_tokenizer(self.read_tokenizer(TextTokenizer), folder)


def _is_serialized(path: Path) -> bool:
    """Whether a file describes an object of Keras, as far as it can be read."""
    try:
        return {"class_name", "config"} <= read_json(path, {}).keys()
    except (OSError, ValueError):
        return False


def _dtype(dtype: Any) -> Any:
    """Returns the name of a dtype, as versions of Keras have written it."""
    if dtype is None or isinstance(dtype, str):
        return dtype or "float32"
    config: JSON = dtype.get("config", {}) if isinstance(dtype, dict) else {}
    return config.get("name", dtype)
