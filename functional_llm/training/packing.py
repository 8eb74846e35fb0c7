"""Examples -> rows of one length -> batches for `fit`.

Shapes: R rows, B rows of a batch, T tokens of a row.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import keras
import numpy as np

from functional_llm.training.examples import Example


@dataclass(frozen=True)
class Rows:
    """Rows of several examples each, which do not see one another.

    Args:
        token_ids: (R, T) int32.
        positions: (R, T) int32, from 0 in each example; -1 for padding.
        segment_ids: (R, T) int32, the number of the example in its row; -1 for padding.
        labels: (R, T) int32, the token to write after this one; -1 where there is none to learn.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of everything."""
        digest = hashlib.sha256(str(self.token_ids.shape).encode())
        for array in (self.token_ids, self.positions, self.segment_ids, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()


def pack(examples: Sequence[Example], length: int, join: bool = True) -> Rows:
    """Lays examples into rows, the longest first, each where it leaves least room.

    Args:
        examples: Of at most `length + 1` tokens: the last one is only a label.
        length: T.
        join: `False` gives each example a row of its own, and makes rows no longer than the longest
            example needs, rounded up to a multiple of 32.

    Returns:
        Rows, as few as that order needs.

    Raises:
        ValueError: If there is no example, or one is too long.
    """
    if not examples:
        raise ValueError("Expected at least one example to pack, received none.")
    longest = max(len(example.token_ids) for example in examples) - 1
    if longest > length:
        raise ValueError(
            f"Expected examples of at most {length + 1} tokens, received one of {longest + 1}. "
            "Truncate them: `make_examples(records, tokenizer, length)`."
        )
    if not join:
        length = min(length, -(-longest // 32) * 32)
    rows = _fill_rows(examples, length) if join else [[example] for example in examples]
    arrays = {name: np.full((len(rows), length), -1, "int32") for name in Rows.__annotations__}
    arrays["token_ids"][:] = 0
    for row, members in enumerate(rows):
        start = 0
        for number, example in enumerate(members):
            size = len(example.token_ids) - 1
            here = (row, slice(start, start + size))
            arrays["token_ids"][here] = example.token_ids[:-1]
            arrays["positions"][here] = np.arange(size)
            arrays["segment_ids"][here] = number
            arrays["labels"][here] = np.where(example.is_target, example.token_ids, -1)[1:]
            start += size
    return Rows(**arrays)


def _fill_rows(examples: Sequence[Example], length: int) -> list[list[Example]]:
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].token_ids))
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in order:
        size = len(examples[i].token_ids) - 1
        at = bisect.bisect_left(rooms, (size, 0))
        if at == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(examples[i])
        if room - size > 0:
            bisect.insort(rooms, (room - size, row))
    return rows


class Batches(keras.utils.PyDataset):
    """Batches for `fit` and `evaluate`: inputs, labels, and weights that are 0 where no label is.

    Which rows a batch holds is a function of its number alone, so that training goes on anywhere.

    Args:
        rows: From `pack`.
        batch_size: B.
        seed: Shuffles the rows anew in each pass over them; batches then go on without end from
            one pass to the next. `None` for one pass in order; its last batch is filled up with
            padding.
        start: Number of the first batch.
        stop: Number after the last batch. Defaults to one pass.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1, received {batch_size}.")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        one_pass = -(-len(rows) // batch_size)
        self.start, self.stop = start, one_pass if stop is None else stop

    def between(self, start: int, stop: int) -> "Batches":
        """Returns the batches from number `start` up to, without, `stop`."""
        return Batches(self.rows, self.batch_size, self.seed, start, stop)

    @property
    def num_batches(self) -> int:
        return self.stop - self.start

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Returns batch `start + index`: inputs, labels (B, T), weights (B, T) float32."""
        chosen = self._chosen(self.start + index)
        taken = {name: getattr(self.rows, name)[chosen] for name in Rows.__annotations__}
        missing = self.batch_size - len(chosen)
        if missing:
            empty = {name: 0 if name == "token_ids" else -1 for name in taken}
            taken = {
                name: np.pad(x, ((0, missing), (0, 0)), constant_values=empty[name])
                for name, x in taken.items()
            }
        labels = taken.pop("labels")
        return taken, labels, (labels >= 0).astype("float32")

    def count_tokens(self, number: int) -> int:
        """Returns how many tokens batch `number` holds, padding left out."""
        return int((self.rows.positions[self._chosen(number)] >= 0).sum())

    def _chosen(self, number: int) -> np.ndarray:
        stream = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        if self.seed is None:
            return stream[stream < len(self.rows)]
        turns, places = np.divmod(stream, len(self.rows))
        return np.array(
            [
                _order(self.seed, int(t), len(self.rows))[p]
                for t, p in zip(turns, places, strict=True)
            ]
        )


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, size: int) -> Any:
    return np.random.default_rng([seed, turn]).permutation(size)
