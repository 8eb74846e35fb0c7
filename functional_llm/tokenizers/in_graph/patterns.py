r"""Regular expressions of pre-tokenizers as ones that RE2, TensorFlow's engine, matches alike.

RE2 has no lookahead, knows ASCII whitespace only, and has other Unicode tables. So its text is not
the text but a character for each character's class: two characters are in one class if no set in
the expression tells them apart. The sets are asked of the library `tokenizers` itself, for every
code point. What a lookahead asks of the next character is part of a character's class, too:
`\s+(?!\S)` becomes W*w, where w is whitespace before whitespace or the end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import tokenizers

from functional_llm.tokenizers.in_graph.refusal import refuse

NUM_CODE_POINTS = 0x110000
MOST_SYMBOLS = 126  # of ASCII, without those that stand for nothing and for a cut
# Multi-character folds: an expression that ignores case may match "ß" where it says "ss".
_FOLDED_TOGETHER = ("ss", "ff", "fi", "fl", "st", "i\u0307", "'n")


@dataclass(frozen=True)
class CharacterSet:
    """One character of a set: the part of an expression that names it."""

    source: str


@dataclass(frozen=True)
class Ahead:
    """What the next character must be: in the set or not; the end of the text may do, too."""

    source: str
    is_in: bool
    at_end: bool


@dataclass(frozen=True)
class Repeat:
    """A part, so many times; the most that fit."""

    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class InTurn:
    """Parts, one after the other."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class OneOf:
    """Parts, of which the first that matches is taken."""

    parts: tuple["Node", ...]


Node: TypeAlias = CharacterSet | Ahead | Repeat | InTurn | OneOf


@dataclass(frozen=True)
class Cut:
    """An expression for text in symbols.

    Args:
        pattern: For RE2.
        classes: The class of each code point.
        next_bits: For each lookahead, whether it is content with a next character of each class;
            with the end, in the last place.
        is_total: Whether it matches at every place, so that nothing is between its matches.
    """

    pattern: str
    classes: np.ndarray
    next_bits: list[np.ndarray]
    is_total: bool


def compile_cut(pattern: str) -> Cut:
    """Compiles a regular expression in Oniguruma's syntax.

    Raises:
        ValueError: If it has parts that cannot be matched in a graph.
    """
    node = _Parser(pattern).parse()
    if _matches_nothing(node):
        raise refuse(f"the expression {pattern!r}, which matches an empty text")
    sets, aheads = sorted(_sources(node)), sorted(_aheads(node), key=repr)
    code = np.zeros(NUM_CODE_POINTS, "int64")
    for place, source in enumerate([*sets, *(ahead.source for ahead in aheads)]):
        code |= members(source).astype("int64") << place
    code[0xD800:0xE000] = code[0]  # halves of surrogate pairs, which no text has
    codes, classes = np.unique(code, return_inverse=True)
    if len(codes) << len(aheads) > MOST_SYMBOLS:
        raise refuse(f"the expression {pattern!r}, which tells too many characters apart")
    first = np.unique(classes, return_index=True)[1]
    next_bits = [
        np.append(members(ahead.source)[first] == ahead.is_in, ahead.at_end) for ahead in aheads
    ]
    symbols = _Symbols({s: members(s)[first] for s in sets}, aheads, len(codes))
    written = symbols.write(node)
    every = range(len(codes) << len(aheads))
    is_total = all(re.fullmatch(written, chr(symbol + 1), re.DOTALL) for symbol in every)
    return Cut(written, classes.astype("int32"), next_bits, is_total)


@cache
def members(source: str) -> np.ndarray:
    """Returns for every code point whether a set in Oniguruma's syntax has it."""
    found = np.zeros(NUM_CODE_POINTS, bool)
    if len(source) == 1 and source not in ".[":
        found[ord(source)] = True
        return found
    # The library itself says so: what it takes out of a text is in the set.
    removing = tokenizers.normalizers.Replace(tokenizers.Regex(f"(?:{source})+"), "")
    for text in all_characters():
        found[code_points(text)] = True
        found[code_points(removing.normalize_str(text))] = False
    return found


@cache
def all_characters() -> tuple[str, ...]:
    """Returns the characters of all code points, as texts of a size that regexes are quick with."""
    points = [*range(0xD800), *range(0xE000, NUM_CODE_POINTS)]
    return tuple("".join(map(chr, points[i : i + 4096])) for i in range(0, len(points), 4096))


def code_points(text: str) -> np.ndarray:
    """Returns the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), "uint32")


def set_of(found: np.ndarray) -> str:
    """Returns the set of some code points in Oniguruma's syntax."""
    edges = np.flatnonzero(np.diff(np.r_[False, found, False].astype("int8")))
    pairs = zip(edges[::2], edges[1::2] - 1, strict=True)
    return "[" + "".join(f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in pairs) + "]"


class _Symbols:
    """Writes an expression for symbols: class times 2 to the number of lookaheads, and their bits.

    A symbol is written as the character of its number, plus one.
    """

    def __init__(self, sets: dict[str, np.ndarray], aheads: Sequence[Ahead], count: int) -> None:
        self._sets, self._aheads, self._count = sets, aheads, count

    def write(self, node: Node) -> str:
        match node:
            case CharacterSet(source):
                return self._set(source, None)
            case Repeat(part, least, most):
                return self._repeat(self.write(part), least, most)
            case OneOf(parts):
                return "(?:" + "|".join(map(self.write, parts)) + ")"
            case InTurn(parts):
                return self._in_turn(parts)
        raise refuse("a lookahead that follows no character")

    def _in_turn(self, parts: Sequence[Node]) -> str:
        written = ""
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if isinstance(part, Ahead):
                continue
            written += (
                self._before(part, following)
                if isinstance(following, Ahead)
                else (self.write(part))
            )
        if parts and isinstance(parts[0], Ahead):
            raise refuse("a lookahead that follows no character")
        return written

    def _before(self, part: Node, ahead: Ahead) -> str:
        match part:
            case CharacterSet(source):
                return self._set(source, ahead)
            case Repeat(CharacterSet(source), least, most) if least > 0:
                rest = self._repeat(self._set(source, None), least - 1, most and most - 1)
                return rest + self._set(source, ahead)
        raise refuse("a lookahead that follows more than repeated characters of one set")

    def _set(self, source: str, ahead: Ahead | None) -> str:
        width = len(self._aheads)
        bit = None if ahead is None else 1 << self._aheads.index(ahead)
        symbols = [
            (number << width | bits) + 1
            for number in range(self._count)
            if self._sets[source][number]
            for bits in range(1 << width)
            if bit is None or bits & bit
        ]
        return "[" + "".join(f"\\x{symbol:02x}" for symbol in symbols) + "]"

    @staticmethod
    def _repeat(written: str, least: int, most: int | None) -> str:
        if most == 0:
            return ""
        return f"(?:{written}){{{least},{'' if most is None else most}}}"


class _Parser:
    """Parses the part of Oniguruma's syntax that pre-tokenizers use."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0

    def parse(self) -> Node:
        node = self._alternatives(ignore_case=False)
        if self._place < len(self._text):
            raise self._unknown(self._text[self._place])
        return node

    def _unknown(self, part: str) -> ValueError:
        return refuse(f"{part!r} in the expression {self._text!r} of its pre-tokenizer")

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._place)
        self._place += len(expected) * found
        return found

    def _alternatives(self, ignore_case: bool) -> Node:
        parts = [self._in_turn(ignore_case)]
        while self._take("|"):
            parts.append(self._in_turn(ignore_case))
        return parts[0] if len(parts) == 1 else OneOf(tuple(parts))

    def _in_turn(self, ignore_case: bool) -> Node:
        parts: list[Node] = []
        start = self._place
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            parts.append(self._repeated(self._atom(ignore_case)))
        plain = self._text[start : self._place].lower()
        if ignore_case and any(pair in plain for pair in _FOLDED_TOGETHER):
            raise self._unknown(f"(?i:{plain})")
        return parts[0] if len(parts) == 1 else InTurn(tuple(parts))

    def _atom(self, ignore_case: bool) -> Node:
        for opening, case in (("(?:", ignore_case), ("(?i:", True)):
            if self._take(opening):
                node = self._alternatives(case)
                if not self._take(")"):
                    raise self._unknown(opening)
                return node
        for opening, is_in in (("(?!", False), ("(?=", True)):
            if self._take(opening):
                inner = self._atom(ignore_case)
                if not isinstance(inner, CharacterSet) or not self._take(")"):
                    raise self._unknown(opening)
                return Ahead(inner.source, is_in, at_end=not is_in)
        if self._take("$"):  # in this syntax, the end of a line
            return Ahead(r"\n", is_in=True, at_end=True)
        source = self._set_source()
        return CharacterSet(f"(?i:{source})" if ignore_case else source)

    def _set_source(self) -> str:
        start, first = self._place, self._text[self._place]
        found = re.compile(
            r"\\[pP]\{\^?\w+\}|\\x\{[0-9a-fA-F]+\}|\\[sSdDwWrntf]|\\[^\w]|\\u[0-9a-fA-F]{4}"
        ).match(self._text, start)
        if found is not None:
            self._place = found.end()
        elif first == "[":
            self._place = self._end_of_set(start)
        elif first in "\\()*+?{}^":
            raise self._unknown(self._text[start : start + 4])
        else:
            self._place += 1
        return self._text[start : self._place]

    def _end_of_set(self, start: int) -> int:
        depth, place = 0, start
        while place < len(self._text):
            character = self._text[place]
            depth += (character == "[") - (character == "]")
            place += 1 + (character == "\\")
            if depth == 0:
                return place
        raise self._unknown(self._text[start:])

    def _repeated(self, node: Node) -> Node:
        found = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}").match(self._text, self._place)
        if found is None:
            return node
        self._place = found.end()
        if self._text[self._place : self._place + 1] in ("?", "+", "*", "{"):
            raise self._unknown(self._text[found.start() : self._place + 1])
        if found[1] is None:
            least, most = {"?": (0, 1), "*": (0, None), "+": (1, None)}[found[0]]
        else:
            least = int(found[1])
            most = int(found[3]) if found[3] else None if found[2] else least
        if isinstance(node, Ahead):
            raise self._unknown(found[0])
        return Repeat(node, least, most)


def _matches_nothing(node: Node) -> bool:
    match node:
        case Repeat(part, least, _):
            return least == 0 or _matches_nothing(part)
        case InTurn(parts):
            return all(map(_matches_nothing, parts))
        case OneOf(parts):
            return any(map(_matches_nothing, parts))
    return isinstance(node, Ahead)


def _parts(node: Node) -> list[Node]:
    """Returns a part and all parts in it."""
    inner = node.parts if isinstance(node, InTurn | OneOf) else ()
    inner = (node.part,) if isinstance(node, Repeat) else inner
    return [node, *(x for part in inner for x in _parts(part))]


def _sources(node: Node) -> set[str]:
    return {x.source for x in _parts(node) if isinstance(x, CharacterSet)}


def _aheads(node: Node) -> set[Ahead]:
    return {x for x in _parts(node) if isinstance(x, Ahead)}
