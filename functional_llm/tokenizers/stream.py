"""StreamDecoder: ids to text while they are being made."""

import codecs
from collections.abc import Callable, Iterable
from operator import index


class StreamDecoder:
    """Ids to text as they come, never half a character.

    Args:
        token_bytes: id -> the bytes that the token stands for.
        drop_space: leave out a space at the very beginning.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], drop_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that the next ids complete; "" while a character is incomplete."""
        data = b"".join(self._token_bytes(index(token_id)) for token_id in ids)
        if data and self._drop_space:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended within a character, else ""."""
        return self._utf8.decode(b"", final=True)
