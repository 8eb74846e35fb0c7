"""A stream of records -> batches, packed while it is read, from any place of it.

Shapes: B rows of a batch, T tokens of a row.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import keras
import numpy as np

from functional_llm.graph.placing import own_rows
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer
from functional_llm.training.examples import (
    Example,
    check_length,
    nothing_to_learn,
    tokenise,
    warn_of_doubts,
)
from functional_llm.training.mixing import draws
from functional_llm.training.packing import Batch, make_rows
from functional_llm.training.record_sources import no_records, stream_records
from functional_llm.training.records import RecordStream

# Examples of uniform lengths up to T fill 89, 95, 98.1 and 99.4 % of a row with 4, 16, 64 and 256
# open ones, lengths of chats (log-normal) 96, 98.5, 98.9 and 99.2 %. `pack`, which sees all
# of them, fills 99.7 and 99.9 %.
_OPEN_ROWS = 64
_KEPT_BATCHES = 16  # Keras reads at most one ahead of the one that it trains on


@dataclass(frozen=True)
class StreamState:
    """Where a stream of rows is: what it has read and not given yet, and numbers.

    Args:
        facts: Where the records go on, and counts, as plain data.
        waiting: The examples that wait to be drawn.
        open_rows: The examples of each row that is not full.
    """

    facts: JSON
    waiting: tuple[Example, ...] = ()
    open_rows: tuple[tuple[Example, ...], ...] = ()

    def to_tensors(self) -> tuple[JSON, dict[str, np.ndarray]]:
        """Returns it as plain data and arrays, for a file."""
        examples = [*self.waiting, *(x for row in self.open_rows for x in row)]
        sizes = [len(self.waiting), *map(len, self.open_rows)]
        tensors = {
            "token_ids": np.concatenate([np.zeros(0, "int32"), *(x.token_ids for x in examples)]),
            "is_target": np.concatenate([np.zeros(0, bool), *(x.is_target for x in examples)]),
            "lengths": np.array([len(x.token_ids) for x in examples], "int32"),
        }
        return {"facts": self.facts, "sizes": sizes}, tensors

    @classmethod
    def from_tensors(cls, facts: JSON, tensors: dict[str, np.ndarray]) -> "StreamState":
        """Returns what `to_tensors` was called on."""
        ends = np.cumsum(tensors["lengths"])[:-1]
        parts = (np.split(tensors[name], ends) for name in ("token_ids", "is_target"))
        examples = iter([Example(*pair) for pair in zip(*parts, strict=True)])
        groups = [tuple(next(examples) for _ in range(size)) for size in facts["sizes"]]
        return cls(facts["facts"], groups[0], tuple(groups[1:]))


class StreamedRows:
    """Rows of a stream of records, in place of `Rows`: tokenised, shuffled and packed as read.

    In memory are the examples that wait to be drawn, and the open rows. A stream that ends begins
    again when all examples that wait are drawn, so that each comes once a pass.

    Args:
        records: A RecordStream, or what `stream_records` takes.
        tokenizer: The model's tokenizer.
        length: T. A longer example is cut.
        join: Whether a row may hold several examples.
        shuffle_buffer: Number of examples of which the next is drawn at random; 0 for the order of
            the records.
        seed: Seed of the draws.
        open_rows: Rows that are filled side by side. An example goes into the fullest of them that
            has room for it; if none has, the fullest is given away.

    Raises:
        ValueError: If a number is too low, or the source cannot be.
    """

    def __init__(
        self,
        records: RecordStream,
        tokenizer: TextTokenizer,
        length: int,
        *,
        join: bool = True,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        open_rows: int = _OPEN_ROWS,
    ) -> None:
        self.records: RecordStream = stream_records(records)
        self.tokenizer, self.length = tokenizer, check_length(length, None)
        self.join, self.shuffle_buffer, self.seed = join, shuffle_buffer, seed
        self.open_rows = open_rows
        if shuffle_buffer < 0 or open_rows < 1:
            raise ValueError(
                "Expected a shuffle buffer of at least 0 examples and at least 1 open row, "
                f"received {shuffle_buffer} and {open_rows}."
            )

    def fingerprint(self) -> str:
        """Returns a SHA-256 of what decides the rows, but not of the data themselves."""
        names = ("length", "join", "shuffle_buffer", "seed", "open_rows")
        facts = {name: getattr(self, name) for name in names}
        facts["records"] = self.records.describe()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Reads one record, to know at once what is wrong with all of them.

        Raises:
            ValueError: If there is none, or it is malformed or lacks columns.
        """
        record = next(iter(self.records), None)
        if record is None:
            raise no_records(self.records.name)
        list(tokenise(record, self.tokenizer, self.length, {}))

    def read(self, state: StreamState | None = None) -> "RowReader":
        """Returns an endless iterator over rows.

        Args:
            state: Where to go on; `None` for the beginning.
        """
        return RowReader(self, state)


class RowReader:
    """An endless iterator over the rows of a stream, each a list of examples.

    Args:
        rows: The stream.
        state: Where to go on; `None` for the beginning.
    """

    def __init__(self, rows: StreamedRows, state: StreamState | None = None) -> None:
        self._rows, facts = rows, {} if state is None else state.facts
        self._place: tuple[JSON | None, int] = (facts.get("records"), facts.get("of_record", 0))
        self._counts: dict[str, int] = {
            name: facts.get(name, 0)
            for name in ("passes", "found", "read", "drawn", "truncated", "dropped", "tokens")
        }
        self._has_ended: bool = facts.get("has_ended", False)
        self._waiting = [] if state is None else list(state.waiting)
        self._open = [] if state is None else [list(row) for row in state.open_rows]
        self._room = [rows.length - sum(map(_size, row)) for row in self._open]
        self._examples = self._read_examples()
        self._draws = draws(rows.seed, self._counts["drawn"])
        self._has_warned = False

    def state(self) -> StreamState:
        """Returns where it is now."""
        records, of_record = self._place
        places = {"records": records, "of_record": of_record, "has_ended": self._has_ended}
        return StreamState(
            {**places, **self._counts}, tuple(self._waiting), tuple(map(tuple, self._open))
        )

    def __iter__(self) -> "RowReader":
        return self

    def __next__(self) -> list[Example]:
        row = self._next_row()
        self._counts["tokens"] += sum(map(_size, row))
        return row

    def _next_row(self) -> list[Example]:
        while True:
            example = self._draw()
            size = _size(example)
            if not self._rows.join or size == self._rows.length:
                return [example]
            fitting = [i for i, room in enumerate(self._room) if room >= size]
            if fitting:
                at = min(fitting, key=self._room.__getitem__)
                self._open[at].append(example)
                self._room[at] -= size
                if not self._room[at]:
                    return self._close(at)
                continue
            is_full = len(self._open) == self._rows.open_rows
            closed = self._close(int(np.argmin(self._room))) if is_full else None
            self._open.append([example])
            self._room.append(self._rows.length - size)
            if closed is not None:
                return closed

    def _close(self, at: int) -> list[Example]:
        del self._room[at]
        return self._open.pop(at)

    def _draw(self) -> Example:
        """Returns an example of those that wait; begins again when a pass is over."""
        while True:
            while not self._has_ended and len(self._waiting) < max(1, self._rows.shuffle_buffer):
                self._read_one()
            if self._waiting:
                break
            if not self._counts["found"]:
                if self._counts["dropped"]:
                    raise nothing_to_learn(self._counts["dropped"], self._rows.length)
                raise no_records(self._rows.records.name)
            self._place, self._has_ended = (None, 0), False
            self._counts |= {"passes": self._counts["passes"] + 1, "found": 0}
            self._examples = self._read_examples()
        if not self._rows.shuffle_buffer:
            return self._waiting.pop()
        self._counts["drawn"] += 1
        at = int(next(self._draws) * len(self._waiting))
        self._waiting[at], self._waiting[-1] = self._waiting[-1], self._waiting[at]
        return self._waiting.pop()

    def _read_one(self) -> None:
        given = next(self._examples, None)
        if given is None:
            self._has_ended = True
            return
        example, self._place = given
        self._counts["read"] += 1
        self._counts["truncated"] += _size(example) > self._rows.length
        cut = example.cut(self._rows.length)
        if cut.is_target.any():
            self._counts["found"] += 1
            self._waiting.append(cut)
        else:
            self._counts["dropped"] += 1

    def _read_examples(self) -> Iterator[tuple[Example, tuple[JSON | None, int]]]:
        """Yields the examples of a pass, each with the place after it: a record, examples of it."""
        (place, skipped), rows = self._place, self._rows
        for record, after in rows.records.read(place):
            doubts: dict[str, str] = {}
            examples = list(tokenise(record, rows.tokenizer, rows.length, doubts))
            if not self._has_warned and doubts:
                warn_of_doubts(doubts)  # of one: a stream has no end at which all could be named
                self._has_warned = True
            for number, example in enumerate(examples[skipped:], skipped + 1):
                yield example, (place, number) if number < len(examples) else (after, 0)
            place, skipped = after, 0


def _size(example: Example) -> int:
    return len(example.token_ids) - 1  # the last token is only a label


class StreamedBatches:
    """Batches of a stream, each made once and in order; the last few are kept.

    Of several processes, each reads the stream and gets the rows that its devices compute: the
    batches are those of one process, and a run may go on with other devices.

    Args:
        rows: The stream.
        batch_size: B.
        state: Where the stream is before batch `number`; `None` for its beginning.
        number: Number of the first batch.
    """

    def __init__(
        self,
        rows: StreamedRows,
        batch_size: int,
        state: StreamState | None = None,
        number: int = 0,
    ) -> None:
        self._reader, self._length, self._batch_size = rows.read(state), rows.length, batch_size
        self._batches: dict[int, Batch] = {}
        self._states = {number: self._reader.state()}
        self._next = number

    def __getitem__(self, number: int) -> Batch:
        """Returns a batch: inputs, labels (B, T), weights (B, T) float32."""
        while self._next <= number:
            members = [next(self._reader) for _ in range(self._batch_size)]
            self._batches[self._next] = make_rows(members, self._length).as_batch()
            self._next += 1
            self._states[self._next] = self._reader.state()
            self._batches.pop(self._next - _KEPT_BATCHES, None)
            self._states.pop(self._next - _KEPT_BATCHES, None)
        return own_rows(self._batches[number], self._batch_size)

    def describe(self, number: int) -> str:
        """Returns a sentence about what was read for the batches before `number`."""
        facts = self._states[number].facts
        parts = [f"{facts['read']} examples were read, which give {facts['tokens']} tokens so far"]
        if facts["truncated"]:
            parts.append(f"{facts['truncated']} were cut off after {self._length} tokens")
        if facts["dropped"]:
            parts.append(f"{facts['dropped']} left out, with no token of an answer")
        if facts["passes"]:
            parts.append(f"passes over all data so far: {facts['passes']}")
        return f"{'; '.join(parts)}."

    def between(self, start: int, stop: int) -> "_Part":
        """Returns the batches from number `start` to number `stop - 1`, for `fit`."""
        return _Part(self, start, stop)

    def count_tokens(self, number: int) -> int:
        """Returns the number of tokens in batch `number`, without padding."""
        _ = self[number]
        return int((self._batches[number][0]["positions"] >= 0).sum())

    def tokens_before(self, number: int) -> int:
        """Returns the number of tokens in all batches before `number`, without padding."""
        return self._states[number].facts["tokens"]

    def state(self, number: int) -> StreamState:
        """Returns where the stream is before batch `number`, one of the last few."""
        return self._states[number]


class _Part(keras.utils.PyDataset):
    """Some batches of a stream."""

    def __init__(self, batches: StreamedBatches, start: int, stop: int) -> None:
        super().__init__()
        self.batches, self.start, self.stop = batches, start, stop

    @property
    def num_batches(self) -> int:
        return self.stop - self.start

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        return self.batches[self.start + index]
