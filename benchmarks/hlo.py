"""Counts in the text of a compiled program: kernels, copies, products that are none any more."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What starts no kernel.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "copy-done",
    "async-done",
}
_IN_PLACE = ("dynamic-update-slice", "scatter")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_OPERANDS = re.compile(r"\((?:[^%()]*%)?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Args:
        name: Its name.
        opcode: What it does.
        shapes: Type and dimensions of each array of its result.
        called: The computations that it calls.
        trips: How often a loop is known to run, else 1.
        text: The line.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    called: tuple[str, ...]
    trips: int
    text: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many elements each array of its result has."""
        return tuple(math.prod(shape) for _, shape in self.shapes)

    @property
    def bytes(self) -> float:
        """Of its result."""
        bits = (_BITS.search(kind) for kind, _ in self.shapes)
        widths = [int(match[0]) if match else 8 for match in bits]  # pred has none
        return sum(n * width / 8 for n, width in zip(self.sizes, widths, strict=True))

    @property
    def is_kernel(self) -> bool:
        """Whether it starts a kernel."""
        return self.opcode not in _FREE


@dataclass
class Hlo:
    """An optimised program.

    Args:
        text: What `compiled.as_text()` returns.
    """

    text: str
    entry: str = ""
    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        here: list[Instruction] = []
        for line in self.text.splitlines():
            begins = _COMPUTATION.match(line)
            if begins:
                here = self.computations.setdefault(begins[2], [])
                self.entry = begins[2] if begins[1] else self.entry
                continue
            match = _INSTRUCTION.match(line)
            if match:
                here.append(_instruction(match, line))

    def loop_body(self) -> str:
        """Returns the computation that the program's own loop runs; the whole if it has none."""
        loops = [x for x in self.computations[self.entry] if x.opcode == "while"]
        return loops[-1].called[0] if loops else self.entry

    def kernels(self, computation: str) -> Iterator[tuple[Instruction, int]]:
        """Yields what starts a kernel, and how often, in a computation and the loops inside."""
        for x in self.computations[computation]:
            if x.is_kernel:
                yield x, 1
            elif x.opcode in ("while", "call", "conditional"):
                for name in x.called:
                    for kernel, times in self.kernels(name):
                        yield kernel, times * x.trips

    def inside(self, kernel: Instruction) -> Iterator[Instruction]:
        """Yields a kernel's instructions: itself, or those fused in it."""
        if kernel.opcode != "fusion":
            yield kernel
        for name in kernel.called:
            yield from (y for x in self.computations[name] for y in self.inside(x))

    def operations(self, dot: Instruction) -> int:
        """Returns how many multiplications and additions a product takes."""
        operand = _OPERANDS.search(dot.text, dot.text.index(" dot("))
        contracted = _CONTRACTED.search(dot.text)
        shapes = self._shapes()
        if operand is None or contracted is None or operand[1] not in shapes:
            return 0
        left = shapes[operand[1]]
        width = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
        return 2 * dot.sizes[0] * width

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name of an instruction -> dimensions of its first result."""
        if not self._known:
            every = (x for own in self.computations.values() for x in own if x.shapes)
            self._known.update({x.name: x.shapes[0][1] for x in every})
        return self._known

    def copies(self, computation: str, size: int) -> list[Instruction]:
        """Returns the kernels with a result of exactly so many elements, made anew."""
        kernels = (x for x, _ in self.kernels(computation) if size in x.sizes)
        return [x for x in kernels if not any(y.opcode in _IN_PLACE for y in self.inside(x))]

    def large_results(self, computation: str, size: int) -> list[Instruction]:
        """Returns the kernels with a result of more elements, made anew."""
        kernels = (x for x, _ in self.kernels(computation) if max(x.sizes, default=0) > size)
        return [x for x in kernels if not any(y.opcode in _IN_PLACE for y in self.inside(x))]

    def multiplied_products(self, computation: str) -> int:
        """Returns how many products have become a multiplication and a reduction."""
        instructions = (y for x, _ in self.kernels(computation) for y in self.inside(x))
        found = {
            match[1]
            for x in instructions
            if x.opcode == "multiply"
            for match in [re.search(r'op_name="([^"]*dot_general)"', x.text)]
            if match
        }
        return len(found)


def _instruction(match: re.Match[str], line: str) -> Instruction:
    _, name, shape, opcode, rest = match.groups()
    shapes = tuple(
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(shape)
    )
    trips = _TRIPS.search(rest)
    called = tuple(dict.fromkeys(_CALLED.findall(rest)))
    return Instruction(name, opcode, shapes, called, int(trips[1]) if trips else 1, line)
