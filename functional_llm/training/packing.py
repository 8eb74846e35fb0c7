"""Examples -> rows of one length -> batches for `fit`.

Shapes: R rows, B rows of a batch, T tokens of a row.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import keras
import numpy as np

from functional_llm.graph.placing import own_rows
from functional_llm.training.examples import Example

Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens. A row holds several examples, which do not attend to one another.

    Args:
        token_ids: (R, T) int32.
        positions: (R, T) int32, from 0 in each example; -1 for padding.
        segment_ids: (R, T) int32, the number of the example in its row; -1 for padding.
        labels: (R, T) int32, the token to predict after this one; -1 for no label.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def as_batch(self) -> Batch:
        """Returns the rows as one batch: inputs, labels (R, T), weights (R, T) float32."""
        inputs = dict(vars(self))
        labels = inputs.pop("labels")
        return inputs, labels, (labels >= 0).astype("float32")

    def fingerprint(self) -> str:
        """Returns a SHA-256 of all arrays."""
        digest = hashlib.sha256(str(self.token_ids.shape).encode())
        for array in (self.token_ids, self.positions, self.segment_ids, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()


def pack(examples: Sequence[Example], length: int, join: bool = True) -> Rows:
    """Packs examples into rows: the longest first, each into the fullest row that has room for it.

    Args:
        examples: Examples of at most `length + 1` tokens: the last token is only a label.
        length: T.
        join: Whether a row may hold several examples. If not, rows are as long as the longest
            example, rounded up to a multiple of 32, and at most `length`.

    Returns:
        The rows.

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
    return make_rows(rows, length)


def make_rows(rows: Sequence[Sequence[Example]], length: int) -> Rows:
    """Writes rows of examples as arrays.

    Args:
        rows: The examples of each row, which fit into it.
        length: T.
    """
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
    """Batches for `fit` and `evaluate`: inputs, labels, and weights that are 0 without a label.

    The number of a batch alone decides its rows, so that training can resume at any batch. Of
    several processes, each gets those that its devices compute.

    Args:
        rows: From `pack`.
        batch_size: B.
        seed: Seed that shuffles the rows anew in each epoch; a batch may then reach over the end of
            an epoch. `None` for one epoch in order, whose last batch is filled with padding.
        start: Number of the first batch.
        stop: Number after the last batch. Defaults to the end of the first epoch.
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
        epoch = -(-len(rows) // batch_size)
        self.start, self.stop = start, epoch if stop is None else stop

    def between(self, start: int, stop: int) -> "Batches":
        """Returns the batches from number `start` to number `stop - 1`."""
        return Batches(self.rows, self.batch_size, self.seed, start, stop)

    @property
    def num_batches(self) -> int:
        return self.stop - self.start

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        """Returns batch `start + index`: inputs, labels (B, T), weights (B, T) float32.

        Raises:
            ValueError: If B does not divide over the devices.
        """
        chosen = self._chosen(self.start + index)
        taken = {name: getattr(self.rows, name)[chosen] for name in Rows.__annotations__}
        missing = self.batch_size - len(chosen)
        if missing:
            empty = {name: 0 if name == "token_ids" else -1 for name in taken}
            taken = {
                name: np.pad(x, ((0, missing), (0, 0)), constant_values=empty[name])
                for name, x in taken.items()
            }
        return own_rows(Rows(**taken).as_batch(), self.batch_size)

    def count_tokens(self, number: int) -> int:
        """Returns the number of tokens in batch `number`, without padding."""
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
def _order(seed: int, turn: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(size)
