"""What a tokenizer of the library `tokenizers` does with a text, as steps for a graph."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import tokenizers

from functional_llm.tokenizers.engines import BYTE_ALPHABET
from functional_llm.tokenizers.in_graph.patterns import (
    NUM_CODE_POINTS,
    Cut,
    all_characters,
    code_points,
    compile_cut,
    set_of,
)
from functional_llm.tokenizers.in_graph.refusal import refuse

# What ByteLevel cuts at.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BEFORE_SPACES = "▁*[^▁]+|▁+"  # one word with the spaces before it


@dataclass(frozen=True)
class ReplaceText:
    """Replaces a string."""

    old: str
    new: str


@dataclass(frozen=True)
class Prefix:
    """Puts a string before a text, unless the text begins with `unless`."""

    text: str
    unless: str | None
    only_first: bool = False  # where the whole text begins


@dataclass(frozen=True)
class Compose:
    """Normal form C; `inert` are the characters that only TensorFlow's Unicode tables know."""

    inert: tuple[str, ...]


Change: TypeAlias = ReplaceText | Prefix | Compose


@dataclass(frozen=True)
class BytePairs:
    """A vocabulary of byte pairs.

    Args:
        merges: For each merge, the ids of both parts and of the result, the first merge first.
        tokens: The ids by which a text begins: of characters, or of single bytes.
        byte_ids: The id of each byte; -1 where there is none.
        words: Ids of whole words, which no merges make.
        unknown: The id of what has no token, if it has one.
        fuses_unknown: Whether such characters in turn are one.
    """

    merges: np.ndarray
    tokens: Mapping[str, int]
    byte_ids: np.ndarray
    words: Mapping[bytes, int] = field(default_factory=dict)
    unknown: int | None = None
    fuses_unknown: bool = False


@dataclass(frozen=True)
class Steps:
    """All that happens to a text.

    Args:
        normalizer: What is done with the text between tokens that are looked for in it as it is.
        splitting: What is done after tokens are looked for in the result; then the cuts into words.
        byte_pairs: The vocabulary.
    """

    normalizer: list[Change]
    splitting: list[Change]
    cuts: list[Cut]
    byte_pairs: BytePairs


def read_steps(tokenizer: tokenizers.Tokenizer) -> Steps:
    """Reads what a tokenizer does.

    Raises:
        ValueError: If it does something that a graph cannot.
    """
    state = json.loads(tokenizer.to_str())
    normalizer = list(_read_normalizer(state["normalizer"], tokenizer))
    byte_level = _is_byte_level(state["pre_tokenizer"])
    byte_pairs = _read_byte_pairs(state["model"], byte_level)
    reader = _PreTokenizer()
    for part in _flat(state["pre_tokenizer"], "pretokenizers"):
        reader.read(part, normalizer)
    patterns = list(reader.patterns)
    if not byte_level and not byte_pairs.words and _never_spans_words(byte_pairs, state["model"]):
        patterns.append(_BEFORE_SPACES)  # changes nothing: shorter words are quicker
    return Steps(normalizer, reader.changes, list(map(compile_cut, patterns)), byte_pairs)


def _flat(state: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if state is None:
        return
    if state["type"] != "Sequence":
        yield state
        return
    for part in state[key]:
        yield from _flat(part, key)


def _read_normalizer(
    state: dict[str, Any] | None, tokenizer: tokenizers.Tokenizer
) -> Iterator[Change]:
    for part in _flat(state, "normalizers"):
        match part:
            case {"type": "NFC"}:
                yield Compose(())
            case {"type": "Prepend", "prepend": text}:
                yield Prefix(text, None)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                yield ReplaceText(old, new)
            case _:
                raise refuse(f"the normalizer {part!r:.200}")


def _is_byte_level(state: dict[str, Any] | None) -> bool:
    parts = list(_flat(state, "pretokenizers"))
    found = [part["type"] == "ByteLevel" for part in parts]
    if any(found[:-1]):
        raise refuse("a pre-tokenizer that goes on after ByteLevel")
    return any(found)


class _PreTokenizer:
    """Reads pre-tokenizers in their order: changes of the text, then cuts."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.patterns: list[str] = []

    def read(self, part: dict[str, Any], normalizer: list[Change]) -> None:
        match part:
            case {"type": "Split", "behavior": behavior, "invert": invert, "pattern": pattern}:
                self.patterns += _read_split(pattern, behavior, invert, normalizer)
            case {"type": "Digits", "individual_digits": alone}:
                digits = set_of(_digits())
                self.patterns.append(digits if alone else f"{digits}+")
            case {"type": "Punctuation", "behavior": "Isolated" | "Contiguous" as behavior}:
                marks = set_of(_punctuation())
                self.patterns.append(marks if behavior == "Isolated" else f"{marks}+")
            case {"type": "Metaspace", "replacement": new, "prepend_scheme": scheme}:
                self._change(ReplaceText(" ", new))
                if scheme != "never":
                    self._change(Prefix(new, unless=new, only_first=scheme == "first"))
                if part.get("split", True):
                    self.patterns.append(f"{new}[^{new}]*|[^{new}]+")
            case {"type": "ByteLevel", "add_prefix_space": adds, "use_regex": cuts}:
                if adds:
                    self._change(Prefix(" ", unless=" "))
                self.patterns += [_GPT2] if cuts else []
            case _:
                raise refuse(f"the pre-tokenizer {part!r:.200}")

    def _change(self, change: Change) -> None:
        if self.patterns:
            raise refuse("a pre-tokenizer that changes words after they are cut")
        self.changes.append(change)


def _read_split(
    pattern: dict[str, str], behavior: str, invert: bool, normalizer: list[Change]
) -> list[str]:
    old = pattern.get("String")
    if any(isinstance(x, ReplaceText) and x.old == old and old not in x.new for x in normalizer):
        return []  # there is none left to split at
    regex = pattern["Regex"] if old is None else "".join(rf"\x{{{ord(x):x}}}" for x in old)
    match behavior, invert:
        case "Isolated", _:
            return [regex]
        case "Removed", True:
            if compile_cut(regex).is_total:
                return [regex]
        case "MergedWithPrevious", False if old is not None and len(old) == 1:
            return [f"[^{regex}]*{regex}|[^{regex}]+"]
        case "MergedWithNext", False if old is not None and len(old) == 1:
            return [f"{regex}[^{regex}]*|[^{regex}]+"]
    raise refuse(f"a pre-tokenizer that splits at {pattern} with {behavior}, invert={invert}")


def _digits() -> np.ndarray:
    splitter = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    found = np.zeros(NUM_CODE_POINTS, bool)
    for text in all_characters():
        # One that is no digit is in one piece with what follows.
        pieces = splitter.pre_tokenize_str("".join(f"{x}__" for x in text))
        found[[ord(x) for x, _ in pieces if len(x) == 1]] = True
    return found


def _punctuation() -> np.ndarray:
    splitter = tokenizers.pre_tokenizers.Punctuation("removed")
    found = np.zeros(NUM_CODE_POINTS, bool)
    for text in all_characters():
        kept = "".join(piece for piece, _ in splitter.pre_tokenize_str(text))
        found[code_points(text)] = True
        found[code_points(kept)] = False
    return found


def _read_byte_pairs(model: dict[str, Any], byte_level: bool) -> BytePairs:
    if model["type"] != "BPE":
        raise refuse(f"a vocabulary of the kind {model['type']} in a tokenizer.json")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refuse(f"{key}={model[key]!r} in its vocabulary of byte pairs")
    vocabulary: dict[str, int] = model["vocab"]
    pairs = (x.split(" ") if isinstance(x, str) else x for x in model["merges"])
    merges = [(vocabulary[a], vocabulary[b], vocabulary[a + b]) for a, b in pairs]
    unknown = vocabulary.get(model["unk_token"]) if model["unk_token"] else None
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    words: dict[bytes, int] = {}
    if byte_level:
        byte_ids = [-1] * 256
        for character, byte in BYTE_ALPHABET.items():
            byte_ids[byte] = vocabulary.get(character, -1)
        characters: dict[str, int] = {}
        if -1 in byte_ids and unknown is not None:
            raise refuse("a vocabulary without all bytes")
    else:
        characters = {x: i for x, i in vocabulary.items() if len(x) == 1}
        byte_ids = [vocabulary.get(x, -1) for x in names] if model["byte_fallback"] else [-1] * 256
        if not characters or len({x >= 0 for x in byte_ids}) == 2:
            raise refuse("a vocabulary without characters, or with tokens for some bytes only")
    if model.get("ignore_merges"):
        words = _words(vocabulary, byte_level)
    return BytePairs(
        merges=np.array(merges, "int64").reshape(-1, 3),
        tokens=characters,
        byte_ids=np.array(byte_ids, "int32"),
        words=words,
        unknown=unknown,
        fuses_unknown=bool(model["fuse_unk"]),
    )


def _words(vocabulary: Mapping[str, int], byte_level: bool) -> dict[bytes, int]:
    if not byte_level:
        return {token.encode(): i for token, i in vocabulary.items()}
    return {
        bytes(BYTE_ALPHABET[x] for x in token): i
        for token, i in vocabulary.items()
        if BYTE_ALPHABET.keys() >= {*token}
    }


def _never_spans_words(byte_pairs: BytePairs, model: dict[str, Any]) -> bool:
    """Whether no merge makes a token with a space behind something else."""
    texts = {i: x for x, i in model["vocab"].items()}
    made = (texts[i] for i in byte_pairs.merges[:, 2].tolist())
    return "▁" in byte_pairs.tokens and not any("▁" in text.lstrip("▁") for text in made)
