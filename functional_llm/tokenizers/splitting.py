"""Splits text at the tokens that were added to a vocabulary."""

from collections.abc import Iterable, Iterator

import tokenizers

_PLAIN = "\ufdd0"  # stands for text between tokens; no text holds this character


class Splitter:
    """Splits text at added tokens, as the library `tokenizers` does: it is asked to.

    To it, all text between tokens is one unknown word.
    """

    def __init__(self, tokens: Iterable[tokenizers.AddedToken]) -> None:
        model = tokenizers.models.WordLevel({_PLAIN: 0}, unk_token=_PLAIN)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.add_tokens(list(tokens))
        added = self._tokenizer.get_added_tokens_decoder()
        self._contents = {token_id: token.content for token_id, token in added.items()}

    def split(self, text: str) -> Iterator[tuple[str | None, int, int]]:
        """Yields the token, or `None` for text between, and its start and end."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield self._contents.get(token_id), start, end


def special_token(text: str) -> tokenizers.AddedToken:
    """Returns the token with this text, of which no other text is a part."""
    return tokenizers.AddedToken(text, special=True, normalized=False)
