"""Streams of records -> one stream: interleaved with weights; or a share of one, held out."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from functional_llm.graph.types import JSON
from functional_llm.training.record_sources import no_records
from functional_llm.training.records import Record, RecordStream

STOPPING_STRATEGIES = (
    "first_exhausted",
    "all_exhausted",
    "all_exhausted_without_replacement",
)


def draws(seed: int | Sequence[int], start: int = 0) -> Iterator[float]:
    """Yields random numbers from 0 to below 1, from number `start` on.

    A count is all of their state: a position in the sequence that `default_rng(seed)` draws.
    """
    bits = np.random.PCG64(seed)
    bits.advance(start)
    rng = np.random.Generator(bits)
    while True:
        yield float(rng.random())


def interleave(
    streams: Sequence[RecordStream],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
) -> RecordStream:
    """Interleaves streams of records.

    The order is that of `datasets.interleave_datasets` with the same seed and strategy, whose
    default is `"first_exhausted"`: there, a small stream ends a pass over all others.

    Args:
        streams: From `stream_records`.
        weights: How often each is drawn from, relative to one another; `None` for in turn.
        seed: Seed of the draws.
        stopping_strategy: When a pass ends. `"first_exhausted"`: with the first stream that ends;
            `"all_exhausted"`: when each has ended, one that has begins again;
            `"all_exhausted_without_replacement"`: when each has ended, none begins again, so that
            every record comes once.

    Raises:
        ValueError: If there is no stream, or the weights or the strategy cannot be.
    """
    if not streams:
        raise ValueError("Expected at least one stream of records, received none.")
    if weights is not None and len(weights) != len(streams):
        raise ValueError(
            f"Expected one weight for each of {len(streams)} datasets, received {len(weights)}: "
            f"{list(weights)}."
        )
    for weight in weights or ():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(
                f"Expected weights above 0, received {weight} in {list(weights or ())}. Leave out "
                "a dataset that is not wanted."
            )
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(
            f"Expected a stopping strategy of {', '.join(STOPPING_STRATEGIES)}, received "
            f"{stopping_strategy!r}."
        )
    if len(streams) == 1:
        return streams[0]
    return _Interleaved(list(streams), weights, seed, stopping_strategy)


class _Interleaved(RecordStream):
    """Streams in turn or at random; what it has read of each is its state, and the turns."""

    def __init__(
        self,
        streams: list[RecordStream],
        weights: Sequence[float] | None,
        seed: int,
        stopping_strategy: str,
    ) -> None:
        self.streams, self.seed, self.stopping_strategy = streams, seed, stopping_strategy
        self.weights = None if weights is None else [float(x) for x in weights]
        self.name = " and ".join(stream.name for stream in streams)

    def describe(self) -> JSON:
        return {
            "streams": [stream.describe() for stream in self.streams],
            "weights": self.weights,
            "seed": self.seed,
            "stopping_strategy": self.stopping_strategy,
        }

    def _order(self, turn: int) -> Iterator[int]:
        if self.weights is None:
            return (number % len(self.streams) for number in count(turn))
        limits = np.cumsum(np.array(self.weights) / sum(self.weights))
        limits /= limits[-1]
        return (int(limits.searchsorted(x, side="right")) for x in draws(self.seed, turn))

    def read(self, state: JSON | None = None) -> Iterator[tuple[Record, JSON]]:
        size = len(self.streams)
        state = state or {"turn": 0, "parts": [None] * size, "ended": [False] * size}
        parts, ended = list(state["parts"]), list(state["ended"])
        readers = [stream.read(part) for stream, part in zip(self.streams, parts, strict=True)]
        ahead: list[tuple[Record, JSON] | None] = [None] * size
        is_over = any if self.stopping_strategy == "first_exhausted" else all
        repeats = self.stopping_strategy == "all_exhausted"
        for turn, i in enumerate(self._order(state["turn"]), state["turn"] + 1):
            if is_over(ended):
                return
            if ended[i] and not repeats:
                continue
            given = ahead[i] or next(readers[i], None)
            if given is None:
                if self.stopping_strategy != "all_exhausted_without_replacement":
                    raise no_records(self.streams[i].name)
                ended[i] = True  # of what is held out, a small stream may have nothing
                continue
            record, parts[i] = given
            ahead[i] = next(readers[i], None)
            if ahead[i] is None:
                ended[i] = True
                if repeats:
                    parts[i], readers[i] = None, self.streams[i].read()
            yield record, {"turn": turn, "parts": [*parts], "ended": [*ended]}


def hold_out(
    stream: RecordStream, share: float, seed: int = 0
) -> tuple[RecordStream, RecordStream]:
    """Splits a stream at random into records to train on and those to hold out.

    Hold out of each stream before they are interleaved: one that begins again is split as before.

    Args:
        stream: The records.
        share: Share to hold out.
        seed: Seed of the choice.

    Returns:
        Two streams.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"Expected to hold out a share between 0 and 1, received {share}.")
    return _Share(stream, share, seed, False), _Share(stream, share, seed, True)


class _Share(RecordStream):
    """The records of a stream that are held out, or the others."""

    def __init__(self, stream: RecordStream, share: float, seed: int, is_held: bool) -> None:
        self.stream, self.share, self.seed, self.is_held = stream, share, seed, is_held
        self.name = stream.name

    def describe(self) -> JSON:
        return {"of": self.stream.describe(), "held_out": self.share, "seed": self.seed}

    def read(self, state: JSON | None = None) -> Iterator[tuple[Record, JSON]]:
        state = state or {"number": 0, "of": None}
        number, numbers = state["number"], draws((self.seed, 1), state["number"])
        for record, of in self.stream.read(state["of"]):
            number += 1
            if (next(numbers) < self.share) == self.is_held:
                yield record, {"number": number, "of": of}
