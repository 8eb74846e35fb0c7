"""Tokenizer: the tokenizer of any handle."""

from pathlib import Path
from typing import Self

from functional_llm.presets.sources import OWN_TOKENIZER, adapter_folder, open_source
from functional_llm.tokenizers import TextTokenizer


class Tokenizer(TextTokenizer):
    """Text to token ids, and back."""

    @classmethod
    def from_preset(cls, handle: str | Path) -> Self:
        """Loads the tokenizer that belongs to a model.

        Args:
            handle: As for `Backbone.from_preset`. Of an adapter: its own tokenizer, if there is
                one in its folder, else that of its base.

        Raises:
            ValueError: At an unknown preset, or a tokenizer that is damaged or of an unknown kind.
            FileNotFoundError: If the path has no such files.
        """
        folder = adapter_folder(handle)
        if folder is not None and any((folder / name).is_file() for name in OWN_TOKENIZER):
            return cls.from_directory(folder)
        return open_source(handle).read_tokenizer(cls)
