"""What writes a Backbone: as a stock file, as a directory, as a repository of the Hub."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family
from functional_llm.formats.hf_directory import write_directory
from functional_llm.formats.model_card import CardFacts, ModelCard, write_card
from functional_llm.formats.upload import push_saved
from functional_llm.presets.edits import check_unedited, edits_of
from functional_llm.presets.sources import licence_of, open_source, transformers_name
from functional_llm.stock.keras_model import write_keras_model
from functional_llm.tokenizers import TextTokenizer, save_tokenizer


class Publishable:
    """The part of a Backbone that saves it; to be named before Keras's class."""

    config: Any
    preset: str | None
    variables: Any

    def _family(self) -> Family | None:
        raise NotImplementedError

    def _unedited(self, family: Family) -> Any:
        raise NotImplementedError

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
        edits = None if family is None else edits_of(self, self._unedited(family))
        with tempfile.TemporaryDirectory() as files:
            self._write_tokenizer(tokenizer, Path(files))
            write_keras_model(self, path, family, self.config, edits, Path(files))

    def write_card(self, file: str | Path, facts: CardFacts | None = None) -> None:
        """Writes a model card (README.md) beside a `.keras` file from `save`.

        Args:
            file: The file. A card beside it that this library did not write stays.
            facts: As for `save_preset`.
        """
        folder = Path(file).parent
        write_card(replace(self._card(folder, facts), stock_file=Path(file).name), folder)

    def _write_tokenizer(self, tokenizer: TextTokenizer | None, folder: Path) -> None:
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        elif self.preset is not None:
            open_source(self.preset).write_tokenizer(folder)

    def save_preset(
        self,
        directory: str | Path,
        tokenizer: TextTokenizer | None = None,
        max_shard_bytes: int = 5_000_000_000,
        facts: CardFacts | None = None,
    ) -> None:
        """Writes a directory in Hugging Face layout, which Transformers and `from_preset` load.

        Args:
            directory: Where to write; files of the same names are replaced, all or none.
            tokenizer: The tokenizer to write beside. Defaults to that of the preset that the
                backbone was loaded from, if there is one.
            max_shard_bytes: Largest size of a file of weights.
            facts: What the model card (README.md) says beside what is known: data, method, losses.
                A card that is there and that this library did not write stays.

        Raises:
            ValueError: As `check_preset`.
            OSError: If the directory cannot be written to.
        """

        def write_beside(folder: Path) -> None:
            self._write_tokenizer(tokenizer, folder)
            write_card(self._card(Path(directory), facts), Path(directory), folder)

        write_directory(
            Path(directory),
            self.check_preset(),
            self.config,
            self.variables,
            write_beside,
            max_shard_bytes,
        )

    def push_to_hub(
        self,
        repository: str,
        tokenizer: TextTokenizer | None = None,
        *,
        facts: CardFacts | None = None,
        private: bool | None = None,
        message: str = "Upload with functional_llm",
        token: str | None = None,
    ) -> str:
        """Saves the model as a repository of the Hugging Face Hub; returns its address.

        Args:
            repository: `"organisation/name"`; made if it is not there.
            tokenizer: As for `save_preset`.
            facts: As for `save_preset`.
            private: As for `flm.push_to_hub`.
            message: Of the commit.
            token: As for `flm.push_to_hub`.

        Raises:
            ValueError: As `check_preset` and `flm.push_to_hub`.
            RuntimeError: As `flm.push_to_hub`.
        """
        self.check_preset()
        return push_saved(
            lambda folder: self.save_preset(folder, tokenizer, facts=facts),
            repository,
            private=private,
            message=message,
            token=token,
        )

    def _card(self, directory: Path, facts: CardFacts | None) -> ModelCard:
        base, _ = (None, None) if self.preset is None else transformers_name(self.preset)
        licence = None if self.preset is None else licence_of(self.preset)
        name = directory.absolute().name
        return ModelCard(name=name, base=base, licence=licence, facts=facts or CardFacts())

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
        check_unedited(self, family, self._unedited(family))
        return family

    def _write_known_tokenizer(self, folder: Path) -> None:
        """Writes the preset's tokenizer, if it can still be found: more must not fail for it."""
        try:
            self._write_tokenizer(None, folder)
        except (FileNotFoundError, ValueError, RuntimeError):
            return
