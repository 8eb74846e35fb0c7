"""StreamDecoder: ids to text while a model generates them."""

import codecs
from collections.abc import Callable, Iterable
from operator import index


class StreamDecoder:
    """Decodes ids one after the other, and never emits half a character.

    Args:
        token_bytes: A function from an id to the token's bytes.
        drop_space: Whether to take off a space at the beginning of the text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], drop_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that the next ids complete: `""` while a character is incomplete."""
        data = b"".join(self._token_bytes(index(token_id)) for token_id in ids)
        if data and self._drop_space:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Returns the rest: U+FFFD if the ids end within a character, else `""`."""
        return self._utf8.decode(b"", final=True)
