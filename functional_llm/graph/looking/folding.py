"""What repeats in a sequence of units: runs of equal layers, and blocks of several in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from functional_llm.graph.looking.units import Source, Units

_LONGEST_BLOCK = 16  # units of a block that repeats


@dataclass(frozen=True)
class Fold:
    """Units that stand for more than themselves.

    Args:
        items: One unit, or the units and folds of a block that repeats.
        times: How often it stands in a row.
        members: The indices of all units in it.
    """

    items: "Sequence[int | Fold]"
    times: int
    members: frozenset[int]


Same: TypeAlias = Callable[[int, int], bool]  # whether two units compute the same, by their indices


def fold(units: Units, same: Same) -> list[Fold]:
    """Returns the units of a graph in order, those that repeat folded.

    Units repeat if they compute the same, take the same of what comes before all of them, and
    what each block returns goes to the next one only, or out of the graph.

    Args:
        units: The units.
        same: Whether two units are equal in themselves.
    """
    return _Folding(units, same).run([(i,) for i in range(len(units.units))])


Column: TypeAlias = tuple[int, ...]  # the units that one stands for, as their block repeats


class _Folding:
    def __init__(self, units: Units, same: Same) -> None:
        self._units, self._same = units, same

    def run(self, columns: Sequence[Column]) -> list[Fold]:
        """Folds a sequence whose units each stand for a column of equal ones already."""
        folds, at = [], 0
        while at < len(columns):
            size, times = self._best([column[0] for column in columns[at:]])
            block = columns[at : at + size * times]
            joined = [tuple(sorted(sum(block[i::size], ()))) for i in range(size)]
            inside = self.run(joined) if size > 1 else list(joined[0][:1])
            members = frozenset(i for column in block for i in column)
            folds.append(Fold(inside, times, members))
            at += size * times
        return folds

    def _best(self, units: list[int]) -> tuple[int, int]:
        """Returns size and number of the blocks that cover most from the first unit on."""
        best = (1, 1)
        for size in range(1, min(_LONGEST_BLOCK, len(units) // 2) + 1):
            times = self._times(units, size)
            if times > 1 and size * times > best[0] * best[1]:
                best = (size, times)
        return best

    def _times(self, units: list[int], size: int) -> int:
        """Returns how often the block of the first units repeats."""
        first, times = units[:size], 1
        while len(units) >= size * (times + 1):
            block = units[size * times : size * (times + 1)]
            if not all(self._same(a, b) for a, b in zip(first, block, strict=True)):
                break
            times += 1
        while times > 1 and not self._is_chain(units, size, times):
            times -= 1
        return times

    def _is_chain(self, units: list[int], size: int, times: int) -> bool:
        blocks = [units[size * i : size * (i + 1)] for i in range(times)]
        wirings = [self._wiring(blocks, i) for i in range(times)]
        if None in wirings or any(x != wirings[1] for x in wirings[2:]):
            return False
        for first, second in zip(wirings[0] or (), wirings[1] or (), strict=True):
            # What the first block takes from anywhere, the second takes from the first.
            if first != second and not (second[0] == "before" and first[0] == "shared"):
                return False
        return all(self._stays_inside(blocks, i) for i in range(times - 1))

    def _wiring(self, blocks: list[list[int]], i: int) -> list[tuple[object, ...]] | None:
        """Returns where each tensor comes from that the units of a block take."""
        places = {unit: (j, k) for j, block in enumerate(blocks) for k, unit in enumerate(block)}
        wiring: list[tuple[object, ...]] = []
        for unit in blocks[i]:
            for source in self._units.units[unit].sources:
                if source.unit is None or source.unit not in places:
                    wiring.append(("shared", *self._from_outside(source)))
                    continue
                block, place = places[source.unit]
                if block < i - 1:
                    return None
                wiring.append(("before" if block < i else "inside", place, source.index))
        return wiring

    def _from_outside(self, source: Source) -> tuple[object, ...]:
        if source.unit is None:  # each layer has a cache of its own
            key = self._units.input_keys[source.index]
            return (key, self._units.input_names[source.index] if key == "input" else "")
        return (source.unit, source.index)

    def _stays_inside(self, blocks: list[list[int]], i: int) -> bool:
        near = {*blocks[i], *blocks[i + 1]}
        return all(self._units.consumers[unit] <= near for unit in blocks[i])
