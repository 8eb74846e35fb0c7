"""Rows in batches: few shapes, and a context that several rows share is read once.

Shapes: B rows, T tokens, C contexts, L tokens of a context.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from functional_llm.evaluation.prefixes import find_runs
from functional_llm.evaluation.rows import Row

_SHORTEST = 16  # T and L, from where on they are powers of two
_FINE = 128  # tokens, from where on there is a step between two powers of two
_SHORTEST_CONTEXT = 8  # tokens; one program for all rows is worth more than what less would save


class Batch(NamedTuple):
    """Rows as arrays.

    Args:
        tokens: (B, T) int32.
        positions: (B, T) int32, -1 for padding.
        labels: (B, T) int32: the token that follows, -1 where nobody asks for its probability.
        owners: (B,) int32, the context that each row goes on from; `None` if the tokens are all.
    """

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    owners: np.ndarray | None = None


class Contexts(NamedTuple):
    """What rows begin with, to be read before any of their batches.

    Args:
        tokens: (C, L) int32.
        positions: (C, L) int32, -1 for padding.
    """

    tokens: np.ndarray
    positions: np.ndarray


class Work(NamedTuple):
    """Contexts that are read together, and the rows that go on from them.

    Args:
        contexts: `None` for rows that stand alone.
        batches: The places of a batch's first rows among all rows, and the batch.
        prefix: What stands before all contexts, one row; the same object for all works that have
            it. `None` for contexts that are whole.
    """

    contexts: Contexts | None
    batches: Sequence[tuple[list[int], Batch]]
    prefix: Contexts | None = None


def make_batches(
    rows: Sequence[Row],
    tokens: int,
    batch_size: int | None = None,
    turning_lengths: Collection[int] = (),
) -> Iterator[Work]:
    """Yields the rows in batches, the longest first.

    The last rows come in the shape of those before: to compute padding takes less time than to
    compile a program. Rows that are added to fill a shape repeat others, and have no labels.

    Args:
        rows: Rows of ids.
        tokens: About so many tokens a batch, padding included.
        batch_size: Rows a batch; `None` for what `tokens` says.
        turning_lengths: Lengths beyond which a model reads all of a text in another way: a context
            is not shared across them, nor what contexts begin with beyond the first.

    Yields:
        Contexts that begin alike, if that saves a batch; each context of several rows once, and
        with it all of their batches; then the other rows.
    """

    def count(length: int) -> int:
        return batch_size or _floor(tokens // length)

    groups, alone = _by_context(rows, turning_lengths)
    shortest = min(turning_lengths, default=math.inf)
    keys = [context for context in groups if len(context) - 1 <= shortest]
    for run in find_runs(keys, tokens):
        ids = keys[run.contexts[0]][: run.length]
        prefix = _contexts([ids], 0, 1, _padded(run.length))
        behind = [groups.pop(keys[i]) for i in run.contexts]
        for work in _go_on(rows, behind, count, run.length):
            yield work._replace(prefix=prefix)
    yield from _go_on(rows, [places for places in groups.values() if len(places) > 1], count)
    alone += [places[0] for places in groups.values() if len(places) == 1]
    lengths = [len(rows[i].inputs) for i in alone]
    for chosen, shape in _shapes(lengths, count):
        places = [alone[i] for i in chosen]
        batch = _arrays([(0, rows[i].inputs, rows[i]) for i in places], shape)
        yield Work(None, [(places, batch)])


def _by_context(
    rows: Sequence[Row], turning_lengths: Collection[int]
) -> tuple[dict[tuple[int, ...], list[int]], list[int]]:
    """Returns context -> the places of rows that have it, and the rows that can share nothing."""
    groups: dict[tuple[int, ...], list[int]] = {}
    alone: list[int] = []
    for i, row in enumerate(rows):
        known = len(row.context) - 1  # its last token predicts the continuation's first
        turns = any(known <= length < len(row.inputs) for length in turning_lengths)
        if turns or known < _SHORTEST_CONTEXT:
            alone.append(i)
        else:
            groups.setdefault(tuple(row.context), []).append(i)
    return groups, alone


def _go_on(
    rows: Sequence[Row], groups: list[list[int]], count: Callable[[int], int], begin: int = 0
) -> Iterator[Work]:
    """Yields work whose contexts are read before their rows.

    Args:
        rows: Rows of ids.
        groups: The places of the rows of each context.
        count: Length -> rows of a batch.
        begin: How many tokens of the contexts stand before them all.
    """
    most = _power_of_two(sum(map(len, groups)), 1)
    lengths = [len(rows[places[0]].context) - 1 - begin for places in groups]
    # Each context, and each row, gets a copy of the cache of what stands before it, whose memory is
    # that of about as many tokens.
    for chosen, (num_contexts, length) in _shapes(lengths, lambda x: count(begin + x)):
        here = [groups[i] for i in chosen]
        longest = _padded(max(len(_rest(rows[i])) for places in here for i in places))
        size = min(count(max((begin + length) // 2, longest)), most)
        known = [rows[places[0]].context[begin:-1] for places in here]
        contexts = _contexts(known, begin, num_contexts, length)
        yield Work(contexts, _rows_behind(rows, here, (size, longest)))


def _contexts(known: Sequence[Sequence[int]], begin: int, count: int, length: int) -> Contexts:
    """Returns contexts as arrays (count, length), whose first tokens have a position."""
    tokens_CL, positions_CL = np.zeros((2, count, length), "int32")
    for i in range(count):
        ids = known[min(i, len(known) - 1)]
        tokens_CL[i, : len(ids)] = ids
        positions_CL[i] = _positions(begin, len(ids), length)
    return Contexts(tokens_CL, positions_CL)


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


def _rows_behind(
    rows: Sequence[Row], groups: list[list[int]], shape: tuple[int, int]
) -> list[tuple[list[int], Batch]]:
    """Returns the rows of each context as batches of one shape."""
    pairs = [(i, owner) for owner, places in enumerate(groups) for i in places]
    batches = []
    for begin in range(0, len(pairs), shape[0]):
        chosen = pairs[begin : begin + shape[0]]
        parts = [(len(rows[i].context) - 1, _rest(rows[i]), rows[i]) for i, _ in chosen]
        owners_B = np.full(shape[0], chosen[-1][1], "int32")
        owners_B[: len(chosen)] = [owner for _, owner in chosen]
        batch = _arrays(parts, shape)._replace(owners=owners_B)
        batches.append(([i for i, _ in chosen], batch))
    return batches


def _rest(row: Row) -> list[int]:
    """Returns what a row's model reads behind the context's cache."""
    return row.inputs[len(row.context) - 1 :]


def _arrays(parts: list[tuple[int, list[int], Row]], shape: tuple[int, int]) -> Batch:
    """Returns rows as arrays.

    Args:
        parts: Of each row the position of its first token, the tokens, and the row.
        shape: (B, T).
    """
    tokens_BT, positions_BT, labels_BT = np.zeros((3, *shape), "int32")
    labels_BT[:] = -1
    for i in range(shape[0]):
        start, ids, row = parts[min(i, len(parts) - 1)]
        tokens_BT[i, : len(ids)] = ids
        positions_BT[i] = _positions(start, len(ids), shape[1])
        if i < len(parts):
            labels_BT[i, len(ids) - len(row.continuation) : len(ids)] = row.continuation
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
