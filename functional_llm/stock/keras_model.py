"""A model in a `.keras` file of ours: stock layers, with a note of what they were made from."""

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import keras

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.formats.hf_config import decode_config, encode_config
from functional_llm.formats.source import Edits, Source, known_family
from functional_llm.formats.tensor_source import TensorSource
from functional_llm.formats.weight_table import Target
from functional_llm.graph.types import JSON
from functional_llm.stock.keras_file import (
    read_description,
    read_tokenizer,
    unpacked_weights,
    write_keras_file,
)
from functional_llm.stock.lowering import Lowering
from functional_llm.tokenizers import TextTokenizer

_Tokenizer = TypeVar("_Tokenizer", bound=TextTokenizer)


class KerasModelFile(Source):
    """A `.keras` file that `write_keras_model` has written, or Keras after loading such a file."""

    suffix = ".keras"
    words = "a .keras file"
    has_tensors = False

    @cached_property
    def _description(self) -> JSON:
        description = read_description(self.path)
        if description.get("edited", True):
            raise ValueError(
                f"The graph in {self.path} is not that of its family "
                f"'{description.get('family')}': it was rewired. `keras.saving.load_model` loads "
                "it as it is. For a Backbone, rewire one in the same way again and call "
                f"`backbone.load_weights('{self.path}')`."
            )
        return description

    @property
    def family(self) -> Family:
        return known_family(self._description["family"], f"{self.path}: family", self.families)

    @cached_property
    def config(self) -> ModelConfig:
        return decode_config(self._description["config"], self.family)

    @property
    def edits(self) -> Edits:
        description = self._description
        quantized = description.get("quantized", {})
        if isinstance(quantized, list):  # as it was before there was int4
            quantized = dict.fromkeys(quantized, "int8")
        return Edits(quantized=quantized, adapters=description["adapters"])

    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        raise NotImplementedError("Keras finds the weights by their places in the stock graph.")

    def load(self, model: keras.Model, targets: Sequence[Target] | None = None) -> None:
        load_keras_weights(self.path, model)

    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            self.write_tokenizer(Path(folder))
            return cls.from_directory(folder)

    def write_tokenizer(self, folder: Path) -> None:
        for name, content in read_tokenizer(self.path).items():
            (folder / name).write_bytes(content)


def load_keras_weights(path: Path, model: keras.Model) -> None:
    """Loads the weights of a `.keras` file into a model with the same graph.

    Args:
        path: What `write_keras_model` has written, or stock Keras after loading such a file.
        model: A Backbone, or any functional model with its inputs and outputs.

    Raises:
        ValueError: If the weights are those of another graph, or damaged.
    """
    with unpacked_weights(path) as weights:
        lowering = Lowering(model)
        lowering.model.load_weights(weights)
        lowering.copy_back()


def write_keras_model(
    model: keras.Model,
    path: Path,
    family: Family | None,
    config: ModelConfig,
    edits: Edits | None,
    tokenizer_files: Path,
) -> None:
    """Writes a model as a `.keras` file of stock layers. The file is replaced when it is complete.

    Args:
        model: A Backbone, or any functional model with its inputs and outputs.
        path: Where to.
        family: Its family; `None` if it has none.
        config: Its numbers.
        edits: What was edited; `None` if the graph was rewired in another way, so that only
            `keras.saving.load_model` can bring it back.
        tokenizer_files: The folder with the files of a tokenizer.

    Raises:
        ValueError: At a layer that stock Keras does not have and that has no lowering.
        OSError: If it cannot be written.
    """
    description: JSON = {"family": None, "edited": True}
    if family is not None:
        description = {
            "family": family.model_type,
            "edited": edits is None,
            "config": encode_config(config),
            "quantized": {} if edits is None else dict(edits.quantized),
            "adapters": [] if edits is None else list(edits.adapters),
        }
    files = {file.name: file.read_bytes() for file in tokenizer_files.iterdir()}
    write_keras_file(Lowering(model).model, path, description, files)
