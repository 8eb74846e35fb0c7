"""Engines cut text into tokens and know the bytes of each token. This one is of `tokenizers`."""

import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias, TypedDict

import tokenizers

SPACE = "▁"
# Start and end of a token's place in the text, in characters.
Offsets: TypeAlias = list[tuple[int, int]]


class Engine(Protocol):
    """An engine cuts text into tokens.

    Attributes:
        vocabulary_size: One more than the largest id.
        num_tokens: How many tokens there are.
        special_ids: The ids of BOS, EOS and the like.
        adds_space: Whether encoding puts a space before a text, which decoding takes off.
    """

    vocabulary_size: int
    num_tokens: int
    special_ids: frozenset[int]
    adds_space: bool

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def encode_with_offsets(self, text: str, parse_special: bool) -> tuple[list[int], Offsets]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_id(self, token: str) -> int | None: ...


class TokenizerFields(TypedDict):
    """The fields of a `TextTokenizer`, as the readers of files return them."""

    engine: Engine
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    add_bos: bool
    stop_token_ids: frozenset[int]
    chat_template: str | Mapping[str, str] | None
    special_tokens: Mapping[str, str]


class TokenizersEngine:
    """The library `tokenizers`.

    Args:
        tokenizer: The library's tokenizer.

    Raises:
        ValueError: If its decoder is of a kind that is not supported.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may ask for truncation and padding, which are the caller's here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.num_tokens = tokenizer.get_vocab_size()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._steps, self.adds_space = _decoding_steps(tokenizer.decoder)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizersEngine, (self.tokenizer,)  # a lock cannot be pickled

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return self._encode(text, parse_special).ids

    def encode_with_offsets(self, text: str, parse_special: bool) -> tuple[list[int], Offsets]:
        encoding = self._encode(text, parse_special)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str, parse_special: bool) -> tokenizers.Encoding:
        # The library keeps this choice as state of the tokenizer, which threads may share.
        with self._lock:
            self.tokenizer.encode_special_tokens = not parse_special
            return self.tokenizer.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        text = self.tokenizer.id_to_token(token_id) or ""
        for step in self._steps:
            # An added token is plain text, not text in GPT-2's byte alphabet.
            if step is _byte_level_bytes and token_id in self._added_ids:
                continue
            result = step(text)
            if isinstance(result, bytes):
                return result
            text = result
        return text.encode()

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def _decoding_steps(
    decoder: tokenizers.decoders.Decoder | None,
) -> tuple[list[Callable[[str], str | bytes]], bool]:
    """Returns a decoder as functions of one token, and whether it takes off the first space."""
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder else {"type": None}
    steps: list[Callable[[str], str | bytes]] = []
    adds_space = False
    for part in state["decoders"] if state["type"] == "Sequence" else [state]:
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level_bytes)
            case {"type": "ByteFallback"}:
                steps.append(_byte_token_bytes)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                steps.append(partial(_replace, old, new))
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                steps.append(partial(_replace, old, " "))
                adds_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                adds_space = bool(start)
            case {"type": "Fuse"}:
                pass
            case _:
                raise ValueError(
                    "This tokenizer.json has an unknown decoder. Expected: ByteLevel, "
                    "ByteFallback, Replace (of a string), Metaspace, Strip (of one space in "
                    f"front), Fuse, or a Sequence of them. Received: {part}. Use the checkpoint of "
                    "a model that generates text: such models have these decoders."
                )
    return steps, adds_space


def _replace(old: str, new: str, token: str) -> str:
    return token.replace(old, new)


def _byte_token_bytes(token: str) -> str | bytes:
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token


def _make_byte_alphabet() -> dict[str, int]:
    # GPT-2 writes a byte as the character of the same number if that is printable. It writes the
    # other bytes as the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


BYTE_ALPHABET = _make_byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(BYTE_ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode()
