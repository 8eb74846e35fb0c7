"""From new ids to text, in whole characters, up to a stop string."""

from collections.abc import Sequence
from itertools import compress

from functional_llm.tokenizers import TextTokenizer


class StoppingDecoder:
    """Decodes the ids of one row as they come, up to a stop string, which may span tokens.

    The end of a text may be the beginning of a stop string. It is held back until the next ids show
    whether it is one. Stop strings are looked for in the text with special tokens, which are then
    left out of it.

    Args:
        tokenizer: What decodes.
        stop: A stop string or several.
        continues: Whether the text goes on from another one, as for `tokenizer.stream_decoder`.

    Attributes:
        stopped: Whether a stop string was found.

    Raises:
        ValueError: If a stop string is empty, or not a string.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stop: str | Sequence[str], continues: bool
    ) -> None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(x, str) and x for x in stops):
            raise ValueError(f"Expected non-empty stop strings, received {stop!r}.")
        self.stopped = False
        self._stops = list(stops)
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder(continues=continues)
        # What is held back, and which of its characters are part of the result.
        self._held = ""
        self._visible: list[bool] = []

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text up to now that cannot belong to a stop string."""
        if self.stopped:
            return ""
        special = self._tokenizer.engine.special_ids
        for token_id in ids:
            if token_id in special:
                self._hold(self._tokenizer.token_text(token_id) or "", False)
            else:
                self._hold(self._decoder.push([token_id]), True)
        return self._take(final=False)

    def finish(self) -> str:
        """Returns the text that was held back: no ids come any more."""
        if self.stopped:
            return ""
        self._hold(self._decoder.finish(), True)
        return self._take(final=True)

    def _hold(self, text: str, is_visible: bool) -> None:
        self._held += text
        self._visible += [is_visible] * len(text)

    def _take(self, final: bool) -> str:
        text = self._held
        found = [i for i in (text.find(stop) for stop in self._stops) if i >= 0]
        self.stopped = bool(found)
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = min(found) if found else len(text) - keep
        result = "".join(compress(text[:cut], self._visible))
        self._held, self._visible = text[cut:], self._visible[cut:]
        return result


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text could begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
