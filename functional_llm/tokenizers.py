"""Tokenizers: text <-> token ids.

`TextTokenizer` holds what every model needs: special ids, chat template, streaming. The cut of text
into tokens is left to one of two engines: `TokenizersEngine` (a tokenizer.json, or the byte-pair
vocabulary of a GGUF file) and `SentencePieceEngine` (a .model, or the vocabulary with scores of a
GGUF file). An engine encodes, and says which bytes a token stands for; decoding is one for all.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (GGUF files)
"""

import codecs
import json
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import index
from pathlib import Path
from typing import Any, Literal, Protocol, Self, overload

import sentencepiece
import tokenizers

from functional_llm.chat_template import ChatTemplate
from functional_llm.pretokenizers import PRE_TOKENIZERS, PreTokenizer

SPACE = "▁"
# Tokens that end a turn under every name that models gave them. Many files name only one `eos`.
END_OF_TURN = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <eos> "
    "<|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <turn|> "
    "<|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)
_GGUF = "tokenizer.ggml"
# GGUF's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Engine(Protocol):
    """What cuts text into tokens."""

    vocabulary_size: int
    special_ids: frozenset[int]
    # The engine puts a space before a text; decoding takes it off.
    adds_space: bool

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_id(self, token: str) -> int | None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """Text <-> ids.

    Args:
        engine: what cuts text into tokens.
        bos_token_id: the id that begins a text, if there is one.
        eos_token_id: the id that ends a text, if there is one.
        pad_token_id: the id that fills a batch, if there is one.
        add_bos: the model was trained on texts that begin with `bos_token_id`.
        stop_token_ids: the ids after which a model has nothing more to say.
        chat_template: the Jinja template that writes messages as text, if there is one.
    """

    engine: Engine
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """The tokenizer of a directory in Hugging Face layout.

        Args:
            path: a directory with tokenizer.json or tokenizer.model (sentencepiece). Read if
                present: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
                generation_config.json, config.json, chat_template.jinja.

        Returns:
            The tokenizer.

        Raises:
            ValueError: if there is no tokenizer, or one of the files is malformed.
        """
        return cls(**_facts_from_directory(Path(path)))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """The tokenizer inside a GGUF file.

        Args:
            metadata: the key-value pairs of the file's header, as plain Python values.

        Returns:
            The tokenizer; it cuts text as llama.cpp does.

        Raises:
            ValueError: if a key is missing, or the tokenizer or its pre-tokeniser is unknown.
        """
        return cls(**_facts_from_gguf(metadata))

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return self.engine.vocabulary_size

    def token_id(self, token: str) -> int | None:
        """The id of one token's exact text, or None."""
        return self.engine.token_id(token)

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: any text.
            add_bos: put `bos_token_id` first.
            parse_special: read special tokens written in the text ("<|im_end|>") as these tokens.
                By default they are plain text, so that a user cannot write them.

        Returns:
            A list of ids.

        Raises:
            ValueError: if `text` is not a valid string, or there is no BOS token to add.
        """
        _check_text(text)
        if not add_bos:
            return self.engine.encode(text, parse_special)
        if self.bos_token_id is None:
            raise ValueError(
                "There is no BOS token to add. Expected: a tokenizer with a `bos_token_id`. "
                "Received: `add_bos=True`. Pass `add_bos=tokenizer.add_bos` for the model's own "
                "convention."
            )
        return [self.bos_token_id, *self.engine.encode(text, parse_special)]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """The text of ids. Bytes that are no valid UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: leave out BOS, EOS and the like.
            continues: the ids go on from earlier text. Otherwise the space that sentencepiece puts
                before a text is taken off.

        Returns:
            The text.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        stream = self.stream_decoder(skip_special_tokens, continues)
        return stream.push(ids) + stream.finish()

    def stream_decoder(
        self, skip_special_tokens: bool = True, continues: bool = False
    ) -> "StreamDecoder":
        """A decoder that receives ids as they are made.

        Args:
            skip_special_tokens: as in `decode`.
            continues: as in `decode`.

        Returns:
            A decoder whose pieces, joined, are what `decode` gives for all the ids.
        """
        skipped = self.engine.special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(
            partial(self._token_bytes, skipped), self.engine.adds_space and not continues
        )

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation, as the model was trained to see it.

        Args:
            messages: dicts with "role" and "content", the oldest first.
            add_generation_prompt: end with the words that begin the assistant's answer.
            tokenize: return ids. They begin with one BOS if the model wants it, also where the
                template writes none.
            variables: what else the template may read, such as `tools`.

        Returns:
            The text, or its ids.

        Raises:
            ValueError: if there is no template, it is malformed, or it refuses the messages.
        """
        text = self._compiled_chat_template.render(
            messages,
            **{
                "add_generation_prompt": add_generation_prompt,
                "bos_token": self._token_text(self.bos_token_id),
                "eos_token": self._token_text(self.eos_token_id),
                **variables,
            },
        )
        if not tokenize:
            return text
        ids = self.encode(text, parse_special=True)
        return self.encode("", add_bos=self.add_bos and ids[:1] != [self.bos_token_id]) + ids

    @cached_property
    def _compiled_chat_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError(
                "This tokenizer has no chat template. Expected: chat_template.jinja, "
                '"chat_template" in tokenizer_config.json, or "tokenizer.chat_template" in a GGUF '
                "file. Received: none of them. Use an instruction-tuned checkpoint, or write the "
                "prompt as plain text."
            )
        return ChatTemplate(self.chat_template)

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.engine.token_bytes(token_id).decode()

    def _token_bytes(self, skipped: frozenset[int], token_id: int) -> bytes:
        if not 0 <= token_id < self.vocabulary_size:
            raise ValueError(
                f"A token id is out of range. Expected: 0 to {self.vocabulary_size - 1}. "
                f"Received: {token_id}. Is this the tokenizer of the model that made the ids?"
            )
        return b"" if token_id in skipped else self.engine.token_bytes(token_id)


class StreamDecoder:
    """Ids to text as they come, never half a character.

    Args:
        token_bytes: id -> the bytes that the token stands for.
        drop_space: leave out a space at the very beginning.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], drop_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that the next ids complete; "" while a character is incomplete."""
        data = b"".join(self._token_bytes(index(token_id)) for token_id in ids)
        if data and self._drop_space:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended within a character, else ""."""
        return self._utf8.decode(b"", final=True)


class TokenizersEngine:
    """The library `tokenizers`.

    Args:
        tokenizer: the library's tokenizer.

    Raises:
        ValueError: if its decoder is of a kind that is not supported.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may ask to cut and fill texts; here that is the caller's.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self.vocabulary_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._steps, self.adds_space = _decoding_steps(tokenizer.decoder)
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        # The library keeps this choice as a state of the tokenizer.
        with self._lock:
            self.tokenizer.encode_special_tokens = not parse_special
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        text = self.tokenizer.id_to_token(token_id) or ""
        for step in self._steps:
            # An added token is text as it stands, not text in GPT-2's byte alphabet.
            if step is _byte_level_bytes and token_id in self._added_ids:
                continue
            result = step(text)
            if isinstance(result, bytes):
                return result
            text = result
        return text.encode()

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def _decoding_steps(decoder: Any) -> tuple[list[Callable[[str], str | bytes]], bool]:
    """The decoder of a tokenizer.json, as functions of one token."""
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
                    f"front), Fuse, or a Sequence of them. Received: {part}. Language models that "
                    "generate text use one of these; take such a checkpoint."
                )
    return steps, adds_space


def _replace(old: str, new: str, token: str) -> str:
    return token.replace(old, new)


def _byte_token_bytes(token: str) -> str | bytes:
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token


def _make_byte_alphabet() -> dict[str, int]:
    # GPT-2 writes a byte as the character of the same number if that is printable, and the
    # others as the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


_BYTE_ALPHABET = _make_byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode()


class SentencePieceEngine:
    """The library `sentencepiece`.

    It never reads control symbols from text, so the text is split at them first; each part then
    begins with the space that the model puts before a text.

    Args:
        processor: the library's tokenizer.
        always: tokens beside the model that are read wherever they stand: text -> id.
        special: the same, read with `parse_special` only.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        always: Mapping[str, int],
        special: Mapping[str, int],
    ) -> None:
        size = processor.vocab_size()
        control = {
            processor.id_to_piece(i): i
            for i in range(size)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        special = control | dict(special)
        self.processor = processor
        self._size = size
        self._added = dict(always) | special
        self._texts = {token_id: text for text, token_id in self._added.items()}
        self._splitters = {False: _make_splitter(always), True: _make_splitter(self._added)}
        self.vocabulary_size = max([size, *(i + 1 for i in self._texts)])
        self.special_ids = frozenset(special.values())
        self.adds_space = processor.normalize("a").startswith(SPACE)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._splitters[parse_special].split(text)):
            # The parts at odd places are the tokens that the text was split at.
            ids += [self._added[part]] if place % 2 else self.processor.encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._texts or token_id >= self._size:
            return self._texts.get(token_id, "").encode()
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id = self.processor.piece_to_id(token)
        return None if token_id == self.processor.unk_id() else token_id


def _make_splitter(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    # Without tokens, an expression that matches nowhere.
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


# A directory in Hugging Face layout


def _facts_from_directory(path: Path) -> dict[str, Any]:
    config, names, generation, model = (
        _read_json(path / f"{name}.json")
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    )
    engine = _engine_from_directory(path, config)

    def special_id(name: str) -> int | None:
        for source in (config, names):
            if name in source:
                token = source[name]
                text = token.get("content") if isinstance(token, dict) else token
                return None if text is None else engine.token_id(text)
        ids = _as_ids(generation.get(f"{name}_id", model.get(f"{name}_id")))
        return ids[0] if ids else None

    bos, eos = special_id("bos_token"), special_id("eos_token")
    stops = {eos, *_as_ids(generation.get("eos_token_id")), *_as_ids(model.get("eos_token_id"))}
    return {
        "engine": engine,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": special_id("pad_token"),
        "add_bos": bos is not None and config.get("add_bos_token", _begins_texts(engine, bos)),
        "stop_token_ids": _stop_token_ids(engine, stops),
        "chat_template": _read_chat_template(path, config),
    }


def _engine_from_directory(path: Path, config: Mapping[str, Any]) -> Engine:
    beside = _read_json(path / "added_tokens.json")
    added = {text: (token_id, True) for text, token_id in beside.items()}
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        added[token["content"]] = (int(token_id), token.get("special", False))
    for name, make in (
        ("tokenizer.json", _engine_from_json),
        ("tokenizer.model", _engine_from_sentencepiece),
    ):
        if (path / name).is_file():
            return make(path / name, added)
    found = sorted(file.name for file in path.iterdir()) if path.is_dir() else "no such folder"
    raise ValueError(
        f"There is no tokenizer in {path}. Expected: tokenizer.json or tokenizer.model. Received: "
        f"{found}. Copy the tokenizer's files there; for older files, Transformers writes a "
        "tokenizer.json with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )


def _engine_from_json(path: Path, added: Mapping[str, tuple[int, bool]]) -> Engine:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # The library raises nothing more specific.
    except Exception as error:
        raise ValueError(
            f"{path} is malformed. Expected: a tokenizer.json of the library tokenizers. "
            f"Received: a file it cannot read ({error}). Fetch the file again."
        ) from error
    for text, (_, special) in sorted(added.items(), key=lambda item: item[1]):
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)])
    expected = {text: token_id for text, (token_id, _) in added.items()}
    received = {text: tokenizer.token_to_id(text) for text in expected}
    if expected != received:
        wrong = {text: i for text, i in received.items() if i != expected[text]}
        raise ValueError(
            f"{path} contradicts the files beside it. Expected: the ids in tokenizer_config.json "
            f"and added_tokens.json. Received: other ids for these tokens: {wrong!r:.300}. Fetch "
            "the files again, all of one revision."
        )
    return TokenizersEngine(tokenizer)


def _engine_from_sentencepiece(path: Path, added: Mapping[str, tuple[int, bool]]) -> Engine:
    processor = _load_sentencepiece(path.read_bytes(), str(path))
    size = processor.vocab_size()
    beside = {text: (i, special) for text, (i, special) in added.items() if i >= size}
    return SentencePieceEngine(
        processor,
        always={text: i for text, (i, special) in beside.items() if not special},
        special={text: i for text, (i, special) in beside.items() if special},
    )


def _load_sentencepiece(proto: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise ValueError(
            f"{origin} is malformed. Expected: a model of the library sentencepiece. Received: "
            f"{len(proto)} bytes that it cannot read ({error}). Fetch the file again; if it is a "
            "tiktoken vocabulary, take a checkpoint with a tokenizer.json."
        ) from error


def _begins_texts(engine: Engine, bos: int) -> bool:
    """Whether a tokenizer puts BOS first where tokenizer_config.json does not say."""
    if isinstance(engine, TokenizersEngine):
        return engine.tokenizer.encode("").ids[:1] == [bos]
    return True


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is malformed. Expected: JSON. Received: a file with an error ({error}). "
            "Fetch the file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is malformed. Expected: a JSON object. Received: {type(content).__name__}. "
            "Fetch the file again."
        )
    return content


def _read_chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _as_ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _stop_token_ids(engine: Engine, known: Iterable[int | None]) -> frozenset[int]:
    ids = {token: engine.token_id(token) for token in END_OF_TURN}
    named = {token: i for token, i in ids.items() if i in engine.special_ids}
    # Beside these, "<|end|>" ends one message of several.
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|flush|>", "<|calls|>"} <= named.keys():
        named.pop("<|end|>", None)
    return frozenset(i for i in (*named.values(), *known) if i is not None)


# The vocabulary of a GGUF file


def _facts_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    kind = _gguf_value(metadata, "model")
    match kind:
        case "gpt2" | "gemma4":
            pre = _pre_tokenizer("gemma4" if kind == "gemma4" else metadata.get(f"{_GGUF}.pre"))
            engine: Engine = _byte_pair_engine(metadata, pre)
            add_bos, default_ids = pre.add_bos, {}
        case "llama":
            engine = _score_engine(metadata)
            add_bos, default_ids = True, {"bos": 1, "eos": 2}
        case _:
            raise ValueError(
                "The GGUF file has an unknown kind of tokenizer. Expected: gpt2, gemma4 or llama. "
                f"Received: {_GGUF}.model = {kind!r}. Take the tokenizer from the checkpoint's "
                "directory in Hugging Face layout."
            )
    ids = {
        name: metadata.get(f"{_GGUF}.{name}_token_id", default_ids.get(name))
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    # Some files name ids that are not in their vocabulary; llama.cpp takes these as absent.
    ids = {name: i if i in range(engine.vocabulary_size) else None for name, i in ids.items()}
    return {
        "engine": engine,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
        "add_bos": ids["bos"] is not None and metadata.get(f"{_GGUF}.add_bos_token", add_bos),
        "stop_token_ids": _stop_token_ids(engine, (ids["eos"], ids["eot"], ids["eom"])),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _gguf_value(metadata: Mapping[str, Any], name: str) -> Any:
    if f"{_GGUF}.{name}" not in metadata:
        found = sorted(key for key in metadata if key.startswith("tokenizer."))
        raise ValueError(
            f"The GGUF file's tokenizer is incomplete. Expected: the key {_GGUF}.{name}. Received: "
            f"{found or 'no key of a tokenizer'}. Take a file that holds its tokenizer, or the "
            "tokenizer of the checkpoint's directory in Hugging Face layout."
        )
    return metadata[f"{_GGUF}.{name}"]


def _gguf_tokens(metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """All tokens and their types."""
    tokens = _gguf_value(metadata, "tokens")
    types = metadata.get(f"{_GGUF}.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise _malformed_vocabulary(
            "a type for each of the tokens, and no token twice",
            f"{len(tokens)} tokens, {len(set(tokens))} different ones, {len(types)} types",
        )
    # Converters got the type of these wrong at times; a turn would then never end.
    return [
        (token or f"[EMPTY_{place}]", CONTROL if token in END_OF_TURN else kind)
        for place, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _malformed_vocabulary(expected: str, received: str) -> ValueError:
    return ValueError(
        f"The GGUF file's vocabulary is malformed. Expected: {expected}. Received: {received}. "
        "Convert the checkpoint again, or take the tokenizer from its directory."
    )


def _pre_tokenizer(name: str | None) -> PreTokenizer:
    if name is None:
        warnings.warn(
            f"The GGUF file has no {_GGUF}.pre: it does not say how its text was cut into words. "
            "Taking llama.cpp's default, which is right for few models. Use a newer conversion.",
            stacklevel=2,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            "The GGUF file has an unknown pre-tokeniser. Expected one of: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Received: {_GGUF}.pre = {name!r}. Take the "
            "tokenizer from the checkpoint's directory in Hugging Face layout."
        )
    return PRE_TOKENIZERS[name]


def _byte_pair_engine(metadata: Mapping[str, Any], pre: PreTokenizer) -> Engine:
    tokens = _gguf_tokens(metadata)
    merges = _gguf_value(metadata, "merges")
    vocabulary = {token: place for place, (token, _) in enumerate(tokens)}
    try:
        model = tokenizers.models.BPE(
            vocabulary,
            [_split_merge(merge) for merge in merges],
            ignore_merges=pre.ignore_merges,
            byte_fallback=not pre.byte_level,
        )
    # The library raises nothing more specific.
    except Exception as error:
        raise _malformed_vocabulary("merges of tokens into tokens", str(error)) from error
    tokenizer = tokenizers.Tokenizer(model)
    words: list[Any] = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in pre.patterns
    ]
    if pre.byte_level:
        words.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
        tokenizer.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.ByteFallback()]
        )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(words)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in tokens
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return TokenizersEngine(tokenizer)


def _split_merge(merge: str) -> tuple[str, str]:
    # The left token may begin with a space itself: the one that separates comes later.
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _score_engine(metadata: Mapping[str, Any]) -> Engine:
    tokens = _gguf_tokens(metadata)
    scores = metadata.get(f"{_GGUF}.scores", [0.0] * len(tokens))
    if len(scores) != len(tokens):
        raise _malformed_vocabulary(f"{len(tokens)} scores, as many as tokens", f"{len(scores)}")
    adds_space = metadata.get(f"{_GGUF}.add_space_prefix", True)
    proto = _sentencepiece_proto(tokens, scores, adds_space)
    return SentencePieceEngine(
        _load_sentencepiece(proto, "The GGUF file's vocabulary"),
        # llama.cpp splits at these too, and puts the space after them.
        always={token: i for i, (token, kind) in enumerate(tokens) if kind == USER_DEFINED},
        special={},
    )


def _sentencepiece_proto(
    tokens: Sequence[tuple[str, int]], scores: Sequence[float], adds_space: bool
) -> bytes:
    """A sentencepiece model in its own format.

    Reference: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    kinds = [kind for _, kind in tokens]
    # The library wants exactly one unknown piece; llama.cpp reads the others as control tokens.
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


def _check_text(text: Any) -> None:
    problem = None if isinstance(text, str) else f"{type(text).__name__}: {text!r:.100}"
    if problem is None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"a string with half a surrogate pair at position {error.start}"
    if problem:
        raise ValueError(
            "`text` cannot be encoded. Expected: a string of Unicode characters. Received: "
            f"{problem}. Decode bytes first; encode a list one text at a time."
        )
