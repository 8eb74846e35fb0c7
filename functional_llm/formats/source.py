"""Sources: a model in files, whatever their format, behind one small interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import keras
from tqdm import tqdm

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.formats.table_checks import check_copies, check_source
from functional_llm.formats.tensor_source import TensorSource, with_originals
from functional_llm.formats.weight_table import (
    Target,
    Tensor,
    expand_table,
    load_weights,
    shapes_of,
    tied_head,
)
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer

_Tokenizer = TypeVar("_Tokenizer", bound=TextTokenizer)
_Named = TypeVar("_Named")


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What was changed in a model since its family's `build` made it.

    Args:
        quantized: Path of each layer that holds integers -> its mode, as of `flm.quantize`.
        adapters: The adapters, as `functional_llm.peft` describes them, in the order of attaching.
    """

    quantized: Mapping[str, str] = field(default_factory=dict)
    adapters: Sequence[JSON] = ()


class Source(ABC):
    """A model in files: its family and numbers, its edits, its tensors, its tokenizer.

    Making one reads nothing yet: `family` and `config` are read when they are asked for, tensors
    one at a time by `load`. A tokenizer can be read though the model cannot.

    Args:
        path: The file or directory, for which `opens` is true.
        families: The families there are, by name.
    """

    suffix: ClassVar[str]  # of a file in this format; empty for a directory
    words: ClassVar[str]  # what the format is called in messages
    has_tensors: ClassVar[bool] = True  # whether `load` takes targets, for tensors one at a time

    def __init__(self, path: Path, families: Mapping[str, Family]) -> None:
        self.path = path
        self.families = families

    @classmethod
    def opens(cls, path: Path) -> bool:
        """Whether an existing path is in this format, as far as its name tells."""
        return path.is_file() and path.suffix == cls.suffix

    @property
    @abstractmethod
    def family(self) -> Family:
        """The family of the model.

        Raises:
            ValueError: If the files name no known family.
        """

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """The model's numbers, in the frozen class of its family.

        Raises:
            ValueError: If one is missing, unknown, or has a value that no part exists for.
        """

    @property
    def edits(self) -> Edits:
        """What was edited; nothing, in formats that cannot say it."""
        return Edits()

    @property
    def rows(self) -> Rows:
        """The weight table, with the names that tensors have in the format."""
        return self.family.rows(self.config)

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of tensors that may be there and that the model does not need."""
        return self.family.ignored_tensors(self.config)

    @abstractmethod
    def open_tensors(self, names: Sequence[str]) -> TensorSource:
        """Returns the tensors under the names of the family's weight table.

        Args:
            names: The names that the model needs.
        """

    @abstractmethod
    def read_tokenizer(self, cls: type[_Tokenizer]) -> _Tokenizer:
        """Returns the tokenizer in the files.

        Raises:
            ValueError: If there is none, it is damaged, or of an unknown kind.
        """

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer as the files of a directory in Hugging Face layout, if there is one.

        Args:
            folder: An existing folder.
        """

    def load(self, model: keras.Model, targets: Sequence[Target] | None = None) -> None:
        """Streams the weights into a model that its family built, edited as `edits` says.

        Args:
            model: The model.
            targets: What stands for its variables; by default they do.

        Raises:
            ValueError: If files and model differ: every missing and unknown tensor and every wrong
                shape is named.
        """
        variables = model.variables if targets is None else targets
        shapes = shapes_of(variables)
        tensors = expand_table(self.rows, shapes, self.config.num_layers)
        # A file may hold the head though it is the embedding: beside it, or in its place.
        copies = dict([tied_head(tensors)]) if self.config.tie_word_embeddings else {}
        source = self.open_tensors([*(tensor.name for tensor in tensors), *copies])
        source = with_originals(source, copies)
        ignored = [*self.ignored, *copies]
        check_source(tensors, shapes, source, ignored)
        load_weights(variables, tensors, source, _progress_bar)
        check_copies(copies, source)


def known_family(name: object, where: str, families: Mapping[str, _Named]) -> _Named:
    """Returns the family, or the families, of this name.

    Args:
        name: What the files say.
        where: The place that says it, for messages.
        families: The families by the names that such files use.

    Raises:
        ValueError: If there is none of this name.
    """
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"{where} is {name!r}. Known families: {', '.join(sorted(families))}.")
    return families[name]


def _progress_bar(tensors: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    # On a terminal only (`disable=None`).
    return iter(
        tqdm(tensors, total=total, desc="Loading weights", unit="tensor", leave=False, disable=None)
    )
