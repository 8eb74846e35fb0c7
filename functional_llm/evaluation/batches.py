"""Rows in batches: few shapes, and a context that several rows share is read once.

Shapes: B rows, T tokens, C contexts, L tokens of a context.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from functional_llm.evaluation.rows import Row

_SHORTEST = 16  # T and L, from where on they are powers of two
_FINE = 128  # tokens, from where on there is a step between two powers of two
_SHORTEST_CONTEXT = 8  # tokens; one program for all rows is worth more than what less would save
_MOST_OF_A_CONTEXT = 16  # rows that one reading of a context serves


class Prefix(NamedTuple):
    """What rows of a batch begin with.

    Args:
        tokens: (C, L) int32.
        positions: (C, L) int32, -1 for padding.
        owners: (B,) int32, the context of each row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    owners: np.ndarray


class Batch(NamedTuple):
    """Rows as arrays.

    Args:
        tokens: (B, T) int32.
        positions: (B, T) int32, -1 for padding.
        labels: (B, T) int32: the token that follows, -1 where nobody asks for its probability.
        prefix: What comes before, or `None` if the tokens are all.
    """

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    prefix: Prefix | None = None


def make_batches(
    rows: Sequence[Row],
    tokens: int,
    batch_size: int | None = None,
    turning_lengths: Collection[int] = (),
) -> Iterator[tuple[list[int], Batch]]:
    """Yields the rows in batches, the longest first.

    The last rows come in the shape of those before: to compute padding takes less time than to
    compile a program. Rows that are added to fill a shape repeat others, and have no labels.

    Args:
        rows: Rows of ids.
        tokens: About so many tokens a batch, padding included.
        batch_size: Rows a batch; `None` for what `tokens` says.
        turning_lengths: Lengths beyond which a model reads all of a text in another way: a context
            is not shared across them.

    Yields:
        The places in `rows` of the batch's first rows, and the batch.
    """
    most = min(_MOST_OF_A_CONTEXT, batch_size or _MOST_OF_A_CONTEXT)
    shared, alone = _share_contexts(rows, most, turning_lengths)
    most = min(most, _power_of_two(max(map(len, shared), default=1), 1))

    def contexts(length: int) -> int:
        # Each row gets a copy of its context's cache.
        return max(1, batch_size // most) if batch_size else _floor(2 * tokens // (length * most))

    lengths = [len(rows[places[0]].context) - 1 for places in shared]
    for chosen, (count, length) in _shapes(lengths, contexts):
        groups = [shared[i] for i in chosen]
        yield _with_prefix(rows, groups, count, count * most, length)
    lengths = [len(rows[i].inputs) for i in alone]
    for chosen, (count, length) in _shapes(lengths, lambda x: batch_size or _floor(tokens // x)):
        places = [alone[i] for i in chosen]
        yield places, _arrays([(0, rows[i].inputs, rows[i]) for i in places], count, length)


def _share_contexts(
    rows: Sequence[Row], most: int, turning_lengths: Collection[int]
) -> tuple[list[list[int]], list[int]]:
    """Returns the places of `most` rows or fewer that share a context, and those of all others."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(rows):
        known = len(row.context) - 1  # its last token predicts the continuation's first
        turns = any(known <= length < len(row.inputs) for length in turning_lengths)
        is_alone = turns or known < _SHORTEST_CONTEXT
        groups.setdefault((i,) if is_alone else tuple(row.context), []).append(i)
    parts = [x[i : i + most] for x in groups.values() for i in range(0, len(x), most)]
    shared = [places for places in parts if len(places) > 1]
    return shared, [places[0] for places in parts if len(places) == 1]


def _shapes(
    lengths: Sequence[int], rows_of: Callable[[int], int]
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yields which sequences make a batch, and its shape: rows and tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count, length = 0, 0
    while order:
        if len(order) > count:
            length = _padded(lengths[order[0]])
            count = min(rows_of(length), _power_of_two(len(order), 1))
        yield order[:count], (count, length)
        order = order[count:]


def _with_prefix(
    rows: Sequence[Row], groups: list[list[int]], num_contexts: int, num_rows: int, length: int
) -> tuple[list[int], Batch]:
    """Returns the places of the rows in groups, each of which has a context, and the batch."""
    places = [i for group in groups for i in group]
    owners = [owner for owner, group in enumerate(groups) for _ in group]
    contexts = [rows[group[0]].context[:-1] for group in groups]
    rest = [(len(rows[i].context) - 1, rows[i].inputs, rows[i]) for i in places]
    longest = max(len(inputs) - start for start, inputs, _ in rest)
    batch = _arrays(rest, num_rows, _padded(longest))
    tokens_CL, positions_CL = np.zeros((2, num_contexts, length), "int32")
    for i in range(num_contexts):
        ids = contexts[min(i, len(contexts) - 1)]
        tokens_CL[i, : len(ids)] = ids
        positions_CL[i] = _positions(0, len(ids), length)
    owners_B = np.array([*owners, *owners[-1:] * (num_rows - len(owners))], "int32")
    return places, batch._replace(prefix=Prefix(tokens_CL, positions_CL, owners_B))


def _arrays(parts: list[tuple[int, list[int], Row]], num_rows: int, length: int) -> Batch:
    """Returns the inputs of rows from a start on, as arrays."""
    tokens_BT, positions_BT, labels_BT = np.zeros((3, num_rows, length), "int32")
    labels_BT[:] = -1
    for i in range(num_rows):
        start, inputs, row = parts[min(i, len(parts) - 1)]
        count = len(inputs) - start
        tokens_BT[i, :count] = inputs[start:]
        positions_BT[i] = _positions(start, count, length)
        if i < len(parts):
            labels_BT[i, count - len(row.continuation) : count] = row.continuation
    return Batch(tokens_BT, positions_BT, labels_BT)


def _positions(start: int, count: int, length: int) -> np.ndarray:
    places = np.arange(length)
    return np.where(places < count, start + places, -1)


def _padded(length: int) -> int:
    """Returns the number of tokens that a length is padded to."""
    padded = _power_of_two(length, _SHORTEST)
    step = padded // 4
    return padded - step if padded > _FINE and length <= padded - step else padded


def _power_of_two(number: int, smallest: int) -> int:
    return max(smallest, 1 << (number - 1).bit_length())


def _floor(number: int) -> int:
    """The largest power of two that is no larger; at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)
