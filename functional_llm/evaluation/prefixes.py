"""Which contexts begin alike, as questions behind the same examples do: that is read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Run(NamedTuple):
    """Contexts that begin alike.

    Args:
        contexts: Their places.
        length: How many tokens they all begin with; each has at least one more.
    """

    contexts: list[int]
    length: int


@dataclass
class _Alike:
    """Contexts, from one in the sorted list on, that have so many tokens in common."""

    length: int
    begin: int
    saved: int = 0  # tokens, by the best runs within
    runs: list[Run] = field(default_factory=list)


def find_runs(contexts: Sequence[tuple[int, ...]], worth: int) -> list[Run]:
    """Returns the runs that save the most tokens, each of them at least so many.

    Those of the sorted contexts that have a number of tokens in common stand side by side, and
    within them those that have more: from the innermost outwards, either all of them are one run,
    or what was found within stays.

    Args:
        contexts: Token ids, all different.
        worth: Tokens; a run has programs of its own.

    Reference:
        [Replacing suffix trees with enhanced suffix arrays](https://doi.org/10.1016/S1570-8667(03)00065-0),
        section 4: the intervals.
    """
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    common = [
        _common_length(contexts[a], contexts[b]) for a, b in zip(order, order[1:], strict=False)
    ]
    open_ones = [_Alike(0, 0)]
    for end, length in enumerate([*common, 0]):
        while open_ones[-1].length > length:
            inner = open_ones.pop()
            saved = inner.length * (end - inner.begin)
            if saved >= max(inner.saved, worth):
                inner.saved, inner.runs = saved, [Run(order[inner.begin : end + 1], inner.length)]
            if open_ones[-1].length < length:
                open_ones.append(_Alike(length, inner.begin))
            open_ones[-1].saved += inner.saved
            open_ones[-1].runs += inner.runs
        if open_ones[-1].length < length:
            open_ones.append(_Alike(length, end))
    return open_ones[0].runs


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens both begin with, of all but the last of each."""
    pairs = zip(a[:-1], b[:-1], strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)) - 1)
