"""The engine of RWKV's World vocabulary: the longest token that fits, one after another.

A line of its file is an id, a token as a Python literal, and the token's length in bytes. GGUF
files hold the tokens with escapes. The id 0, which the file leaves out, ends a text.
Reference: https://github.com/BlinkDL/ChatRWKV/blob/main/tokenizer/rwkv_tokenizer.py
"""

import ast
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from functional_llm.files.json_files import write_json
from functional_llm.tokenizers.engines import Offsets
from functional_llm.tokenizers.splitting import Splitter, special_token

FILE_NAME = "rwkv_vocab_v20230424.txt"
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"
_HEAD = 2  # bytes of a text that say which lengths to try


class LongestMatchEngine:
    """Takes the longest token that the rest of a text begins with.

    Args:
        tokens: The bytes of tokens by their ids. Each single byte is one of them.
        special: The texts of special tokens by their ids.

    Raises:
        ValueError: If a byte is no token.
    """

    adds_space = False

    def __init__(self, tokens: Mapping[int, bytes], special: Mapping[int, str]) -> None:
        self.tokens, self.special = dict(tokens), dict(special)
        self._ids = {token: i for i, token in tokens.items()}
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if missing:
            raise ValueError(f"no tokens for the bytes {missing}")
        lengths: dict[bytes, set[int]] = defaultdict(lambda: {1})
        for token in self._ids:
            lengths[token[:_HEAD]].add(len(token))
        self._lengths = {head: sorted(x, reverse=True) for head, x in lengths.items()}
        self._special_ids = {text: i for i, text in special.items()}
        self._splitters = {
            False: Splitter(()),
            True: Splitter(map(special_token, special.values())),
        }
        self.vocabulary_size = 1 + max(*tokens, *special)
        self.num_tokens = len({*tokens, *special})
        self.special_ids = frozenset(special)

    def __reduce__(self) -> tuple[Any, ...]:
        return LongestMatchEngine, (self.tokens, self.special)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for name, start, end in self._splitters[parse_special].split(text):
            part = text[start:end].encode()
            ids += [i for i, _ in self._match(part)] if name is None else [self._special_ids[name]]
        return ids

    def encode_with_offsets(self, text: str, parse_special: bool) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        for name, start, end in self._splitters[parse_special].split(text):
            if name is not None:
                ids.append(self._special_ids[name])
                offsets.append((start, end))
                continue
            part = text[start:end]
            places = [0, *accumulate(len(character.encode()) for character in part)]
            for token_id, (first, last) in self._match(part.encode()):
                ids.append(token_id)
                begin, behind = bisect_right(places, first) - 1, bisect_left(places, last)
                offsets.append((start + begin, start + behind))
        return ids, offsets

    def _match(self, text: bytes) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yields the tokens of a text, and where they begin and end in it."""
        start = 0
        while start < len(text):
            lengths = self._lengths.get(text[start : start + _HEAD], (1,))
            pieces = (text[start : start + length] for length in lengths)
            token = next(piece for piece in pieces if piece in self._ids)
            end = start + len(token)
            yield self._ids[token], (start, end)
            start = end

    def token_bytes(self, token_id: int) -> bytes:
        special = self.special.get(token_id)
        return self.tokens.get(token_id, b"") if special is None else special.encode()

    def token_id(self, token: str) -> int | None:
        return self._special_ids.get(token, self._ids.get(token.encode()))


def read_world(path: Path, ids: Mapping[str, int]) -> LongestMatchEngine:
    """Returns the engine of a file.

    Args:
        path: The file.
        ids: Of the tokens that the files beside it describe.

    Raises:
        ValueError: If it is malformed.
    """
    tokens: dict[int, bytes] = {}
    try:
        for line in path.read_text("utf-8").splitlines():
            number, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            token = ast.literal_eval(literal)
            tokens[int(number)] = token = token.encode() if isinstance(token, str) else token
            if len(token) != int(length):
                raise ValueError(f"the line {line!r}, whose token has {len(token)} bytes")
        special = {0: END_OF_TEXT} | {i: text for text, i in ids.items()}
        special = {i: text for i, text in special.items() if i not in tokens}
        return LongestMatchEngine(tokens, special)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{path} is malformed. Expected: lines of an id, a token as a Python literal and its "
            f"length in bytes; each single byte among them. Received: {error}. Fetch it again."
        ) from error


def save_world(engine: LongestMatchEngine, folder: Path) -> None:
    """Writes the file of an engine, and its special tokens beside it."""
    lines = []
    for token_id, token in sorted(engine.tokens.items()):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{token_id} {literal} {len(token)}\n")
    (folder / FILE_NAME).write_text("".join(lines), encoding="utf-8")
    write_json(folder / "added_tokens.json", {text: i for i, text in engine.special.items()})


def unescape(token: str) -> bytes:
    """Returns the bytes of a token in a GGUF file, where it is written as a Python literal."""
    return token.encode("latin-1").decode("unicode_escape").encode("latin-1")
