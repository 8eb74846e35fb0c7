"""Checkpoints: the families there are, and what the files of a model hold."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import keras
from tqdm import tqdm

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family
from functional_llm.files.json_files import read_json
from functional_llm.formats.gguf_checkpoint import GGUFCheckpoint, read_raw_config
from functional_llm.formats.gguf_file import GGUFFile, open_gguf
from functional_llm.formats.hf_config import read_config
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.weight_table import (
    TensorSource,
    check_copies,
    check_source,
    expand_table,
    load_weights,
    with_prefix,
)
from functional_llm.stock.keras_file import read_tokenizer
from functional_llm.tokenizers import TOKENIZER_FILES, TextTokenizer, save_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config is read, and whose tensors are not."""

    family: Family
    config: Any
    open_tensors: Callable[[list[str]], TensorSource]

    def load(self, variables: list[keras.Variable]) -> None:
        """Streams the tensors into the variables; strict both ways."""
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


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the config of a directory in Hugging Face layout or of a `.gguf` file."""
    if path.is_file():
        return _open_gguf_checkpoint(open_gguf(path))
    raw = read_json(path / "config.json")
    family = known_family(raw.get("model_type"), f"{path / 'config.json'}: model_type")

    def open_tensors(names: list[str]) -> TensorSource:
        return with_prefix(open_safetensors(path), family.base_prefix, names)

    return Checkpoint(family, read_config(raw, family), open_tensors)


def _open_gguf_checkpoint(file: GGUFFile) -> Checkpoint:
    families = {f.gguf_architecture: f for f in FAMILIES.values() if f.gguf_architecture}
    architecture = file.metadata.get("general.architecture")
    family = known_family(architecture, f"{file.path}: general.architecture", families)
    config = read_config(read_raw_config(file, family), family)
    return Checkpoint(family, config, lambda names: GGUFCheckpoint(file, names, family, config))


def known_family(
    name: Any, where: str, families: Mapping[str, Family] = MappingProxyType(FAMILIES)
) -> Family:
    """Returns the family of this name.

    Raises:
        ValueError: If there is none; the message begins with `where`.
    """
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"{where} is {name!r}. Known families: {', '.join(sorted(families))}.")
    return families[name]


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copies the tokenizer's files of a directory or .keras file, or writes that of a GGUF file."""
    if path.suffix == ".keras" and path.is_file():
        for name, content in read_tokenizer(path).items():
            (folder / name).write_bytes(content)
        return
    if path.is_file():
        save_tokenizer(TextTokenizer.from_gguf_metadata(open_gguf(path).metadata), folder)
        return
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)


def _progress_bar(items: Iterator[Any], total: int) -> Iterator[Any]:
    # On a terminal only (`disable=None`).
    return iter(
        tqdm(items, total=total, desc="Loading weights", unit="tensor", leave=False, disable=None)
    )
