"""Reads the tokenizer of a directory in Hugging Face layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from functional_llm.files.json_files import read_json
from functional_llm.tokenizers.engines import (
    Engine,
    SentencePieceEngine,
    TokenizerFields,
    TokenizersEngine,
)
from functional_llm.tokenizers.sentencepiece_model import load_sentencepiece
from functional_llm.tokenizers.stop_tokens import stop_token_ids


def read_directory(path: Path) -> TokenizerFields:
    """Reads a directory in Hugging Face layout."""
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
                _check(isinstance(text, str | None), name, "the text of a token", token)
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
        "add_bos": bos is not None and config.get("add_bos_token", _adds_bos(engine, bos)),
        "stop_token_ids": stop_token_ids(engine, stops),
        "chat_template": _read_chat_template(path, config),
    }


def _engine_from_directory(path: Path, config: Mapping[str, Any]) -> Engine:
    beside = _read_json(path / "added_tokens.json")
    _check(all(type(x) is int for x in beside.values()), "added_tokens.json", "ids", beside)
    added = {text: (token_id, True) for text, token_id in beside.items()}
    decoder = config.get("added_tokens_decoder") or {}
    _check(isinstance(decoder, dict), "added_tokens_decoder", "a dict of ids to tokens", decoder)
    for token_id, token in decoder.items():
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
        _check(is_token and token_id.isdigit(), "added_tokens_decoder", "ids and tokens", decoder)
        added[token["content"]] = (int(token_id), bool(token.get("special", False)))
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
    # The library raises no narrower class.
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
            "all files again, from one revision."
        )
    return TokenizersEngine(tokenizer)


def _engine_from_sentencepiece(path: Path, added: Mapping[str, tuple[int, bool]]) -> Engine:
    processor = load_sentencepiece(path.read_bytes(), str(path))
    size = processor.vocab_size()
    beside = {text: (i, special) for text, (i, special) in added.items() if i >= size}
    return SentencePieceEngine(
        processor,
        user_defined={text: i for text, (i, special) in beside.items() if not special},
        special={text: i for text, (i, special) in beside.items() if special},
    )


def _adds_bos(engine: Engine, bos: int) -> bool:
    """Whether a tokenizer puts BOS first if tokenizer_config.json does not say."""
    if isinstance(engine, TokenizersEngine):
        return engine.tokenizer.encode("").ids[:1] == [bos]
    return True


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, default={}, advice="Fetch the file again.")


def _read_chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        pairs = [(x.get("name"), x.get("template")) for x in template if isinstance(x, dict)]
        _check(len(pairs) == len(template), "chat_template", "templates with names", template)
        template = dict(pairs).get("default")
    _check(isinstance(template, str | None), "chat_template", "a Jinja template", template)
    return template


def _as_ids(value: object) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    _check(all(type(x) is int for x in ids), "eos_token_id or the like", "ids of tokens", value)
    return [x for x in ids if x >= 0]  # -1 stands for none in old configs


def _check(is_valid: bool, key: str, expected: str, received: object) -> None:
    if not is_valid:
        raise ValueError(
            f"A file of the tokenizer is malformed. Expected: {expected} under {key!r}. Received: "
            f"{received!r:.200}. Fetch the files again."
        )
