"""From new ids to text, in whole characters, up to a stop string."""

from collections.abc import Sequence

from functional_llm.tokenizers import TextTokenizer


class StoppingDecoder:
    """Decodes the ids of one row as they come, up to a stop string, which may span tokens.

    The end of a text may be the beginning of a stop string. It is held back until the next ids show
    whether it is one.

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
        self._decoder = tokenizer.stream_decoder(continues=continues)
        self._held = ""

    def push(self, ids: list[int]) -> str:
        """Returns the text up to now that cannot belong to a stop string."""
        return "" if self.stopped else self._take(self._decoder.push(ids), final=False)

    def finish(self) -> str:
        """Returns the text that was held back: no ids come any more."""
        return "" if self.stopped else self._take(self._decoder.finish(), final=True)

    def _take(self, text: str, final: bool) -> str:
        text = self._held + text
        found = [i for i in (text.find(stop) for stop in self._stops) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text could begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
