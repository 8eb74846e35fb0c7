"""Reads the tokenizer of a directory in Hugging Face layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from functional_llm.files.json_files import read_json
from functional_llm.tokenizers import longest_match, tiktoken_files
from functional_llm.tokenizers.added_tokens import AddedTokens, check, read_added_tokens
from functional_llm.tokenizers.engines import Engine, TokenizerFields, TokenizersEngine
from functional_llm.tokenizers.sentencepiece_conversion import PrependScheme, convert_sentencepiece
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.sentencepiece_model import load_sentencepiece
from functional_llm.tokenizers.stop_tokens import stop_token_ids
from functional_llm.tokenizers.transformers_classes import (
    class_name,
    gpt2_tokenizer,
    is_gpt2,
    llama_scheme,
    read_as_class,
)

TEMPLATE_FOLDER = "additional_chat_templates"


def read_directory(path: Path) -> TokenizerFields:
    """Reads a directory in Hugging Face layout."""
    config, names, generation, model, beside = (
        _read_json(path / f"{name}.json")
        for name in (
            "tokenizer_config",
            "special_tokens_map",
            "generation_config",
            "config",
            "added_tokens",
        )
    )
    added = read_added_tokens(config, names, beside)
    engine = _engine_from_directory(path, added, config, model)

    def special_id(name: str) -> int | None:
        if name in added.named:
            text = added.named[name]
            return None if text is None else engine.token_id(text)
        ids = _as_ids(generation.get(f"{name}_id", model.get(f"{name}_id")))
        return ids[0] if ids else None

    bos, eos = special_id("bos_token"), special_id("eos_token")
    # Transformers 4 did what tokenizer_config.json says. Version 5 does what the post-processor in
    # tokenizer.json does, and loses the BOS that DeepSeek-R1-Distill-Qwen was published with.
    adds = config.get("add_bos_token")
    check(isinstance(adds, bool | None), "add_bos_token", "true or false", adds)
    stops = {eos, *_as_ids(generation.get("eos_token_id")), *_as_ids(model.get("eos_token_id"))}
    return {
        "engine": engine,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": special_id("pad_token"),
        "add_bos": bos is not None and (_adds_bos(path, engine, bos) if adds is None else adds),
        "stop_token_ids": stop_token_ids(engine, stops),
        "chat_template": read_chat_template(path, config),
        "special_tokens": {name: text for name, text in added.named.items() if text is not None},
    }


def _engine_from_directory(
    path: Path, added: AddedTokens, config: Mapping[str, Any], model: Mapping[str, Any]
) -> Engine:
    if (path / "tokenizer.json").is_file():
        return _engine_from_json(path / "tokenizer.json", added, config, model)
    if (path / "tokenizer.model").is_file():
        scheme = llama_scheme(config, model)
        return _engine_from_sentencepiece(path / "tokenizer.model", added, scheme)
    file = path / tiktoken_files.FILE_NAME
    if class_name(config, model) == tiktoken_files.CLASS and file.is_file():
        return _with_added(tiktoken_files.read_tiktoken(file, added.ids), added, file)
    file = path / longest_match.FILE_NAME
    if file.is_file():
        return longest_match.read_world(file, added.ids)
    if is_gpt2(config, model) and (path / "vocab.json").is_file():
        return _engine_from_vocabulary(path, added, config)
    found = sorted(file.name for file in path.iterdir()) if path.is_dir() else "no such folder"
    raise ValueError(
        f"There is no tokenizer in {path}. Expected: tokenizer.json or tokenizer.model. Received: "
        f"{found}. Copy the tokenizer's files there; for older files, Transformers writes a "
        "tokenizer.json with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )


def _engine_from_json(
    path: Path, added: AddedTokens, config: Mapping[str, Any], model: Mapping[str, Any]
) -> Engine:
    try:
        text = read_as_class(path.read_text("utf-8"), config, model)
        tokenizer = tokenizers.Tokenizer.from_str(text)
    # The library raises no narrower class.
    except Exception as error:
        raise ValueError(
            f"{path} is malformed. Expected: a tokenizer.json of the library tokenizers. "
            f"Received: a file it cannot read ({error}). Fetch the file again."
        ) from error
    return _with_added(tokenizer, added, path)


def _engine_from_vocabulary(path: Path, added: AddedTokens, config: Mapping[str, Any]) -> Engine:
    """Reads the two files of GPT-2, which are all that OPT was published with."""
    files = path / "vocab.json", path / "merges.txt"
    try:
        model = tokenizers.models.BPE.from_file(*map(str, files))
    # The library raises no narrower class.
    except Exception as error:
        raise ValueError(
            f"The vocabulary in {path} is malformed. Expected: vocab.json, and merges.txt of its "
            f"tokens. Received: files that the library tokenizers cannot read ({error}). Fetch "
            "them again."
        ) from error
    return _with_added(gpt2_tokenizer(model, config), added, path)


def _with_added(tokenizer: tokenizers.Tokenizer, added: AddedTokens, path: Path) -> Engine:
    tokenizer.add_tokens(added.beside(tokenizer.get_added_tokens_decoder().values()))
    wrong = {text: tokenizer.token_to_id(text) for text in added.ids}
    wrong = {text: i for text, i in wrong.items() if i != added.ids[text]}
    if wrong:
        raise ValueError(
            f"{path} contradicts the files beside it. Expected: the ids in tokenizer_config.json "
            f"and added_tokens.json. Received: other ids for these tokens: {wrong!r:.300}. Fetch "
            "all files again, from one revision."
        )
    return TokenizersEngine(tokenizer)


def _engine_from_sentencepiece(
    path: Path, added: AddedTokens, scheme: PrependScheme | None
) -> Engine:
    proto = path.read_bytes()
    processor = load_sentencepiece(proto, str(path))
    if scheme is not None:
        return _with_added(convert_sentencepiece(proto, {}, scheme), added, path)
    tokens = {}
    following = max([processor.vocab_size(), *(i + 1 for i in added.ids.values())])
    for token in added.beside(()):
        piece = processor.piece_to_id(token.content)
        token_id = added.ids.get(token.content)
        if token_id is None and processor.id_to_piece(piece) == token.content:
            token_id = piece
        if token_id is None:
            token_id, following = following, following + 1
        tokens[token.content] = (token, token_id)
    return SentencePieceEngine(proto, tokens, str(path))


def _adds_bos(path: Path, engine: Engine, bos: int) -> bool:
    """Whether a tokenizer puts BOS first if tokenizer_config.json does not say."""
    is_sentencepiece = (path / "tokenizer.model").is_file()
    if isinstance(engine, TokenizersEngine) and (
        (path / "tokenizer.json").is_file() or not is_sentencepiece
    ):
        return engine.tokenizer.encode("").ids[:1] == [bos]
    return True


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, default={}, advice="Fetch the file again.")


def read_chat_template(path: Path, config: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    """Returns the chat template of a directory, or several by their names."""
    template = config.get("chat_template")
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    pairs = [(x.get("name"), x.get("template")) for x in named if isinstance(x, dict)]
    check(len(pairs) == len(named), "chat_template", "templates with names", template)
    templates: dict[Any, Any] = dict(pairs)
    if templates.get("default", "") is None:
        del templates["default"]
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / TEMPLATE_FOLDER).glob("*.jinja"))}
    templates |= {name: _read_text(file) for name, file in files.items() if file.is_file()}
    for name, text in templates.items():
        is_template = isinstance(name, str) and isinstance(text, str)
        check(is_template, "chat_template", "a Jinja template", template)
    return templates.get("default") if templates.keys() <= {"default"} else templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no valid UTF-8: {error}. Fetch the file again.") from None


def _as_ids(value: object) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    check(all(type(x) is int for x in ids), "eos_token_id or the like", "ids of tokens", value)
    return [x for x in ids if x >= 0]  # -1 stands for none in old configs
