"""Directories in Hugging Face layout, read and written: config, safetensors, tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import keras
from tqdm import tqdm

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.wrapper import Wrapper, with_other_prefix
from functional_llm.files.json_files import read_json, write_json
from functional_llm.files.replacing import replaced_folder
from functional_llm.formats.float8 import scaled_back
from functional_llm.formats.hf_config import read_config, write_config
from functional_llm.formats.mxfp4 import unpacked
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.safetensors_writer import WEIGHT_FILES, write_safetensors
from functional_llm.formats.source import Source, known_family
from functional_llm.formats.tensor_source import TensorSource, with_names, with_prefix
from functional_llm.formats.weight_table import (
    HEAD,
    expand_table,
    export_weights,
    shapes_of,
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
    def _wrapper(self) -> Wrapper | None:
        wrappers = (wrapper for family in self.families.values() for wrapper in family.wrappers)
        return next((x for x in wrappers if x.model_type == self._raw.get("model_type")), None)

    @cached_property
    def _text(self) -> JSON:
        """The keys of the text model: all, or those that a wrapper has for it."""
        wrapper = self._wrapper
        if wrapper is None:
            return self._raw
        text = self._raw.get(wrapper.text_key)
        if not isinstance(text, dict):
            raise ValueError(
                f"{self.path / _CONFIG}: expected the keys of the text model as "
                f"{wrapper.text_key}, received {text!r:.200}."
            )
        text = {"model_type": wrapper.text_family, **wrapper.text_defaults, **text}
        if any(self.path.glob("*.safetensors")):
            # Wrapper and text model may say different things. A head of its own is untied.
            names = map(wrapper.text_name, open_safetensors(self.path).shapes)
            text["tie_word_embeddings"] = HEAD not in names
        return text

    @property
    def family(self) -> Family:
        key = "model_type" if self._wrapper is None else f"{self._wrapper.text_key}.model_type"
        where = f"{self.path / _CONFIG}: {key}"
        others = {name: x for x in self.families.values() for name in x.other_model_types}
        return known_family(self._text.get("model_type"), where, {**others, **self.families})

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self._text, self.family)

    @property
    def ignored(self) -> Sequence[str]:
        return [*super().ignored, *(self._wrapper.ignored if self._wrapper else ())]

    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        folder = open_safetensors(self.path)
        source = unpacked(folder)
        source = scaled_back(folder) if source is folder else source
        if self._wrapper is not None:
            source = with_names(source, self._wrapper.text_name)
        family = self.family
        source = with_names(
            source, lambda name: _renamed(name, family.stored_prefixes, family.stored_parts)
        )
        return with_prefix(source, self.family.base_prefix, names)

    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        return cls.from_directory(self.path)

    def write_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.path, folder)


def _renamed(name: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """Returns the name of a tensor with another beginning, and with other parts."""
    for part, other in parts.items():
        name = name.replace(part, other)
    return with_other_prefix(name, prefixes)


def _inverted(names: Mapping[str, str]) -> dict[str, str]:
    return {other: name for name, other in names.items()}


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
    tensors = expand_table(family.rows(config), shapes_of(variables), config.num_layers)
    with replaced_folder(directory, stale=WEIGHT_FILES) as folder:
        stored = [_inverted(x) for x in (family.stored_prefixes, family.stored_parts)]
        bar = {"desc": "Writing weights", "unit": "tensor", "leave": False, "disable": None}
        values = tqdm(export_weights(variables, tensors), total=len(tensors), **bar)
        named = ((_renamed(name, *stored), value) for name, value in values)
        write_safetensors(folder, named, max_shard_bytes)
        write_tokenizer(folder)
        ids = read_json(folder / "generation_config.json", {})
        ids = {key: ids[key] for key in _TOKEN_IDS if key in ids}
        write_json(folder / _CONFIG, write_config(config, family, variables[0].dtype) | ids)
