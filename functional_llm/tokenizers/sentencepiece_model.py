"""Reads and writes models of the library sentencepiece."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece

# The types of its tokens, which GGUF uses too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def load_sentencepiece(proto: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Loads a model into the library's tokenizer.

    Args:
        proto: The model in its own format.
        origin: The place of the model, for messages.

    Raises:
        ValueError: If the library cannot read the model.
    """
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise ValueError(
            f"{origin} is malformed. Expected: a model of the library sentencepiece. Received: "
            f"{len(proto)} bytes that it cannot read ({error}). Fetch the file again; if it is a "
            "tiktoken vocabulary, take a checkpoint with a tokenizer.json."
        ) from error


@dataclass(frozen=True)
class ModelFacts:
    """What a model says of itself.

    Args:
        pieces: The text, score and type of each token.
        kind: `"bpe"` or `"unigram"`.
        unknown: The id of the unknown token.
        byte_fallback: Whether characters outside the vocabulary become tokens of bytes.
        charsmap: The table by which characters are normalised, empty for none.
        adds_space: Whether a space is put before a text.
        removes_spaces: Whether spaces at both ends, and repeated ones, are removed.
    """

    pieces: list[tuple[str, float, int]]
    kind: str
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    adds_space: bool
    removes_spaces: bool


def read_model_facts(proto: bytes) -> ModelFacts:
    """Returns what a model says of itself.

    Args:
        proto: A model that the library has read.

    Raises:
        ValueError: If the model is of a kind that cuts text into words or characters.

    Reference: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in read_fields(proto):
        if isinstance(value, int):
            continue
        if field == 1:
            piece: dict[int, Any] = dict(read_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(read_fields(value))
    kind = {1: "unigram", 2: "bpe"}.get(int(trainer.get(3, 1)))
    if kind is None:
        raise ValueError(
            "The sentencepiece model has an unknown kind. Expected: byte pairs or unigram. "
            f"Received: model_type {trainer[3]!r}. It cannot be written as a tokenizer.json."
        )
    return ModelFacts(
        pieces=pieces,
        kind=kind,
        unknown=[kind for _, _, kind in pieces].index(UNKNOWN),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=bytes(normalizer.get(2, b"")),
        adds_space=bool(normalizer.get(3, 1)),
        removes_spaces=bool(normalizer.get(4, 1)),
    )


def make_sentencepiece_proto(
    tokens: Sequence[tuple[str, int]], scores: Sequence[float], adds_space: bool
) -> bytes:
    """Returns a sentencepiece model in its own format.

    Args:
        tokens: The text and type of each token.
        scores: The score of each token.
        adds_space: Whether the model puts a space before a text.

    Reference: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    kinds = [kind for _, kind in tokens]
    # The library needs exactly one unknown token; llama.cpp treats the others as control tokens.
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in kinds]
    kinds[unknown] = UNKNOWN
    pieces = b"".join(
        _proto_bytes(
            1,
            _proto_bytes(1, token.encode()) + _proto_float(2, score) + _proto_int(3, kind),
        )
        for (token, _), score, kind in zip(tokens, scores, kinds, strict=True)
    )
    bpe, byte_fallback = _proto_int(3, 2), _proto_int(35, BYTE in kinds)
    trainer = bpe + byte_fallback + _proto_int(40, unknown)
    # Add the space in front, keep repeated spaces, write spaces as "▁".
    normalizer = _proto_int(3, adds_space) + _proto_int(4, 0) + _proto_int(5, 1)
    return pieces + _proto_bytes(2, trainer) + _proto_bytes(3, normalizer)


def merges_proto(
    ids: Mapping[str, int], kinds: Mapping[str, int], merges: Sequence[str], adds_space: bool
) -> bytes:
    """Returns a model in the library's own format of one as the library tokenizers has it.

    Args:
        ids: Text of each token -> its id.
        kinds: Types of tokens that are not normal ones or bytes.
        merges: Pairs of tokens with a space between, those that are merged first in front.
        adds_space: As for `make_sentencepiece_proto`.

    Raises:
        ValueError: If there are ids without tokens.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise ValueError("a sentencepiece model has a token for each id; this vocabulary has not.")

    def kind(text: str) -> int:
        if text in kinds:
            return kinds[text]
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return BYTE
        # What no pair makes must not come out of any.
        return NORMAL if len(text) == 1 or text in ranks else CONTROL

    tokens = [(text, kind(text)) for text in texts]
    scores = [-float(ranks.get(text, len(ranks))) for text in texts]
    return make_sentencepiece_proto(tokens, scores, adds_space)


def with_pieces(proto: bytes, added: Mapping[str, tuple[object, int]]) -> bytes:
    """Returns a model that has added tokens as tokens of its own, which it finds in a text.

    Args:
        proto: The model in its own format.
        added: Text of each -> what is known of it, and its id.

    Raises:
        ValueError: If one takes the place of another token, or there are ids without tokens.
    """
    pieces = [text for text, _, _ in read_model_facts(proto).pieces]
    for text, (_, token_id) in sorted(added.items(), key=lambda item: item[1][1]):
        if token_id == len(pieces):
            # Fields of a message may come in any order, one behind the other.
            piece = _proto_bytes(1, text.encode()) + _proto_int(3, USER_DEFINED)
            proto, pieces = proto + _proto_bytes(1, piece), [*pieces, text]
        elif token_id > len(pieces) or pieces[token_id] != text:
            raise ValueError(f"the sentencepiece model cannot have {text!r} as token {token_id}.")
    return proto


def read_fields(proto: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yields the number and value of each field of a message; numbers of 4 or 8 bytes as bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = proto[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(proto):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 2: -1, 5: 4}[tag & 7]
        size = varint() if size < 0 else size
        yield tag >> 3, proto[place : place + size]
        place += size


def _proto_bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _proto_float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _proto_int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
