"""The engine of the library `sentencepiece`."""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import tokenizers

from functional_llm.tokenizers.engines import SPACE, Offsets
from functional_llm.tokenizers.sentencepiece_model import load_sentencepiece, read_fields
from functional_llm.tokenizers.splitting import Splitter, special_token


class SentencePieceEngine:
    """The library `sentencepiece`.

    The library never reads control symbols from text, so the text is split at them first. Each part
    then begins with the space that the model puts before a text.

    Args:
        proto: The model in its own format.
        added: Tokens that text is split at, and their ids: tokens beside the model, and those of
            its own of which more is known than the model says. Special ones are read with
            `parse_special` only. The control symbols of the model need not be among them.
        origin: The place of the model, for messages.

    Raises:
        ValueError: If the library cannot read the model.
    """

    def __init__(
        self,
        proto: bytes,
        added: Mapping[str, tuple[tokenizers.AddedToken, int]],
        origin: str = "A sentencepiece model",
    ) -> None:
        processor = load_sentencepiece(proto, origin)
        size = processor.vocab_size()
        control = {
            processor.id_to_piece(i): (special_token(processor.id_to_piece(i)), i)
            for i in range(size)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        self.proto = proto
        self.processor = processor
        self.added = control | dict(added)
        self._given = dict(added)
        self._size = size
        self._texts = {i: text for text, (_, i) in self.added.items()}
        tokens = [token for token, _ in self.added.values()]
        self._splitters = {
            False: Splitter(token for token in tokens if not token.special),
            True: Splitter(tokens),
        }
        self.vocabulary_size = max([size, *(i + 1 for i in self._texts)])
        self.num_tokens = len({*range(size), *self._texts})
        self.special_ids = frozenset(i for token, i in self.added.values() if token.special)
        self.adds_space = processor.normalize("a").startswith(SPACE)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceEngine, (self.proto, self._given)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for token, start, end in self._splitters[parse_special].split(text):
            ids += self.processor.encode(text[start:end]) if token is None else [self._id(token)]
        return ids

    def encode_with_offsets(self, text: str, parse_special: bool) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        for token, start, end in self._splitters[parse_special].split(text):
            if token is not None:
                ids.append(self._id(token))
                offsets.append((start, end))
                continue
            for token_id, (first, last) in self._encode_part(text[start:end]):
                ids.append(token_id)
                offsets.append((start + first, start + last))
        return ids, offsets

    def _encode_part(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Returns the tokens of a text without added tokens, with their places in characters."""
        # Its own classes for this have changed from version to version; the format stays.
        # Field 2 is a token; its fields 2, 4 and 5 are its id, and start and end in bytes.
        message = read_fields(self.processor.encode(text, out_type="serialized_proto"))
        tokens = [dict(read_fields(x)) for field, x in message if field == 2]  # type: ignore[arg-type]
        places = [0, *accumulate(len(character.encode()) for character in text)]
        found: list[tuple[int, tuple[int, int]]] = []
        following = len(text)
        for token in reversed(tokens):
            start, end = (bisect_left(places, int(token.get(key, 0))) for key in (4, 5))
            # The bytes of a character before the last one, and a space that was put in front.
            following = following if start == end else end
            found.append((int(token.get(2, 0)), (start, following)))
        return found[::-1]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._texts or token_id >= self._size:
            return self._texts.get(token_id, "").encode()
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self._id(token)
        token_id = self.processor.piece_to_id(token)
        return None if token_id == self.processor.unk_id() else token_id

    def _id(self, token: str) -> int:
        return self.added[token][1]
