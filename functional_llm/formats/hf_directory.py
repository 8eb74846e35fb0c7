"""Directories in Hugging Face layout, read and written: config, safetensors, tokenizer."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import keras

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.files.json_files import read_json, write_json
from functional_llm.files.replacing import replaced_folder
from functional_llm.formats.hf_config import read_config, write_config
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.safetensors_writer import WEIGHT_FILES, write_safetensors
from functional_llm.formats.source import Source, known_family
from functional_llm.formats.weight_table import (
    TensorSource,
    expand_table,
    export_weights,
    with_prefix,
)
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer, copy_tokenizer

_CONFIG = "config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_Tokenizer = TypeVar("_Tokenizer", bound=TextTokenizer)


class HuggingFaceDirectory(Source):
    """A directory with `config.json`, `*.safetensors` and the files of a tokenizer."""

    suffix = ""
    words = "a directory in Hugging Face layout"

    @classmethod
    def opens(cls, path: Path) -> bool:
        return path.is_dir()

    @cached_property
    def _raw(self) -> JSON:
        return read_json(self.path / _CONFIG)

    @property
    def family(self) -> Family:
        where = f"{self.path / _CONFIG}: model_type"
        return known_family(self._raw.get("model_type"), where, self.families)

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self._raw, self.family)

    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        return with_prefix(open_safetensors(self.path), self.family.base_prefix, names)

    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        return cls.from_directory(self.path)

    def write_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.path, folder)


def write_directory(
    directory: Path,
    family: Family,
    config: ModelConfig,
    variables: Sequence[keras.Variable],
    write_tokenizer: Callable[[Path], None],
    max_shard_bytes: int,
) -> None:
    """Writes a model that is as its family built it. Files of the same names are replaced.

    Args:
        directory: Where to.
        family: The model's family.
        config: Its numbers.
        variables: All its variables.
        write_tokenizer: Writes the tokenizer's files into a folder.
        max_shard_bytes: Largest size of a file of weights.

    Raises:
        OSError: If the directory cannot be written to. All is as it was then.
    """
    tensors = expand_table(family.weights, [v.path for v in variables], config.num_layers)
    with replaced_folder(directory, stale=WEIGHT_FILES) as folder:
        write_safetensors(folder, export_weights(variables, tensors), max_shard_bytes)
        write_tokenizer(folder)
        ids = read_json(folder / "generation_config.json", {})
        ids = {key: ids[key] for key in _TOKEN_IDS if key in ids}
        write_json(folder / _CONFIG, write_config(config, family, variables[0].dtype) | ids)
