"""Reads and writes models of the library sentencepiece."""

import struct
from collections.abc import Sequence

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
