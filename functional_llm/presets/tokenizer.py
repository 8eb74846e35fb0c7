"""Tokenizer: the tokenizer of any handle."""

from pathlib import Path
from typing import Self

from functional_llm.presets.sources import open_source
from functional_llm.tokenizers import TextTokenizer


class Tokenizer(TextTokenizer):
    """Text to token ids, and back."""

    @classmethod
    def from_preset(cls, handle: str | Path) -> Self:
        """Loads the tokenizer that belongs to a model.

        Args:
            handle: As for `Backbone.from_preset`.

        Raises:
            ValueError: At an unknown preset, or a tokenizer that is damaged or of an unknown kind.
            FileNotFoundError: If the path has no such files.
        """
        return open_source(handle).read_tokenizer(cls)
