"""From new ids to text: characters whole, stop strings held back until they are certain."""

from collections.abc import Sequence

from functional_llm.tokenizers import TextTokenizer


class StoppingDecoder:
    """One row's text: ids in, text out, up to a stop string that may span tokens."""

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
        """Returns the text that is certain: no stop string can begin in it."""
        return "" if self.stopped else self._take(self._decoder.push(ids), final=False)

    def finish(self) -> str:
        """Returns what was held back."""
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
    """How many characters at the end of the text could be the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
