"""Reads the tokenizer inside a GGUF file, to cut text as llama.cpp does.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import warnings
from collections.abc import Mapping
from typing import Any

import tokenizers

from functional_llm.tokenizers.byte_pairs import byte_pair_engine
from functional_llm.tokenizers.engines import Engine, TokenizerFields
from functional_llm.tokenizers.longest_match import LongestMatchEngine, unescape
from functional_llm.tokenizers.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    make_sentencepiece_proto,
)
from functional_llm.tokenizers.stop_tokens import END_OF_TURN, stop_token_ids

_GGUF = "tokenizer.ggml"
_TEMPLATE = "tokenizer.chat_template"
_NAMED_TEMPLATES = ("rwkv-world",)  # the name of one inside llama.cpp, in place of its text
# The names of special tokens in templates, and in the keys of their ids.
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "sep": "seperator"}
_SPECIAL |= {"cls": "cls", "mask": "mask"}


def read_gguf_vocabulary(metadata: Mapping[str, Any]) -> TokenizerFields:
    """Reads the metadata of a GGUF file."""
    _check_types(metadata)
    kind = _gguf_value(metadata, "model")
    match kind:
        case "gpt2" | "gemma4":
            pre = _pre_tokenizer("gemma4" if kind == "gemma4" else metadata.get(f"{_GGUF}.pre"))
            engine: Engine = _byte_pair_engine(metadata, pre)
            add_bos, default_ids = pre.add_bos, {}
        case "llama":
            engine = _sentencepiece_engine(metadata)
            add_bos, default_ids = True, {"bos": 1, "eos": 2}
        case "rwkv":
            engine = _world_engine(metadata)
            add_bos, default_ids = False, {"bos": 0, "eos": 0}
        case _:
            raise ValueError(
                "The GGUF file has an unknown kind of tokenizer. Expected: gpt2, gemma4, llama or "
                f"rwkv. Received: {_GGUF}.model = {kind!r}. Take the tokenizer from the "
                "checkpoint's directory in Hugging Face layout."
            )
    ids = {
        name: metadata.get(f"{_GGUF}.{name}_token_id", default_ids.get(name))
        for name in ("eot", "eom", *_SPECIAL.values())
    }
    # Some files name ids that are not in their vocabulary; llama.cpp ignores these.
    size = engine.vocabulary_size
    ids = {name: i if type(i) is int and 0 <= i < size else None for name, i in ids.items()}
    return {
        "engine": engine,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
        "add_bos": ids["bos"] is not None and metadata.get(f"{_GGUF}.add_bos_token", add_bos),
        "stop_token_ids": stop_token_ids(engine, (ids["eos"], ids["eot"], ids["eom"])),
        "chat_template": _chat_template(metadata),
        "special_tokens": {
            f"{name}_token": engine.token_bytes(i).decode(errors="replace")
            for name, key in _SPECIAL.items()
            if (i := ids[key]) is not None
        },
    }


def _chat_template(metadata: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    default, prefix = metadata.get(_TEMPLATE), f"{_TEMPLATE}."
    if default in _NAMED_TEMPLATES:
        default = None
    named = {k.removeprefix(prefix): x for k, x in metadata.items() if k.startswith(prefix)}
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _check_types(metadata: Mapping[str, Any]) -> None:
    lists = [f"{_GGUF}.{name}" for name in ("tokens", "token_type", "scores", "merges")]
    texts = [f"{_GGUF}.model", f"{_GGUF}.pre"]
    texts += [key for key in metadata if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")]
    for key, expected in {**dict.fromkeys(lists, list), **dict.fromkeys(texts, str)}.items():
        if key in metadata and not isinstance(metadata[key], expected):
            received = f"{metadata[key]!r:.100}"
            raise _malformed_vocabulary(f"a {expected.__name__} under {key}", received)


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
    """Returns all tokens and their types."""
    tokens = _gguf_value(metadata, "tokens")
    types = metadata.get(f"{_GGUF}.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise _malformed_vocabulary(
            "a type for each of the tokens, and no token twice",
            f"{len(tokens)} tokens, {len(set(tokens))} different ones, {len(types)} types",
        )
    # Some converters gave END_OF_TURN another type; a turn would then never end.
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
            f"The GGUF file has no {_GGUF}.pre, the name of its pre-tokenizer. Text is cut into "
            "words by llama.cpp's default, which is right for few models. Use a newer conversion.",
            stacklevel=2,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            "The GGUF file has an unknown pre-tokenizer. Expected one of: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Received: {_GGUF}.pre = {name!r}. Take the "
            "tokenizer from the checkpoint's directory in Hugging Face layout."
        )
    return PRE_TOKENIZERS[name]


def _byte_pair_engine(metadata: Mapping[str, Any], pre: PreTokenizer) -> Engine:
    tokens = _gguf_tokens(metadata)
    added = [
        tokenizers.AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in tokens
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    vocabulary = {token: place for place, (token, _) in enumerate(tokens)}
    merges = _gguf_value(metadata, "merges")
    try:
        return byte_pair_engine(vocabulary, [_split_merge(x) for x in merges], added, pre)
    except ValueError as error:
        raise _malformed_vocabulary("merges of tokens into tokens", str(error)) from error


def _split_merge(merge: str) -> tuple[str, str]:
    # The left token may begin with a space itself; the separator is a later one.
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece_engine(metadata: Mapping[str, Any]) -> Engine:
    tokens = _gguf_tokens(metadata)
    scores = metadata.get(f"{_GGUF}.scores", [0.0] * len(tokens))
    if len(scores) != len(tokens):
        raise _malformed_vocabulary(f"{len(tokens)} scores, as many as tokens", f"{len(scores)}")
    adds_space = metadata.get(f"{_GGUF}.add_space_prefix", True)
    proto = make_sentencepiece_proto(tokens, scores, adds_space)
    # llama.cpp splits text at these too, and puts a space before each part.
    added = {
        token: (tokenizers.AddedToken(token, normalized=False), i)
        for i, (token, kind) in enumerate(tokens)
        if kind == USER_DEFINED
    }
    return SentencePieceEngine(proto, added, "The GGUF file's vocabulary")


def _world_engine(metadata: Mapping[str, Any]) -> Engine:
    tokens = _gguf_tokens(metadata)
    known = {i: text for i, (text, kind) in enumerate(tokens) if kind == NORMAL}
    special = {i: text for i, (text, kind) in enumerate(tokens) if kind == CONTROL}
    try:
        return LongestMatchEngine({i: unescape(text) for i, text in known.items()}, special)
    except ValueError as error:
        raise _malformed_vocabulary("all bytes among the tokens", str(error)) from error
