"""Writes a tokenizer as files of a directory in Hugging Face layout."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from functional_llm.files.json_files import read_json, write_json
from functional_llm.tokenizers import longest_match, tiktoken_files
from functional_llm.tokenizers.directory_reader import TEMPLATE_FOLDER, read_chat_template
from functional_llm.tokenizers.engines import TokenizersEngine
from functional_llm.tokenizers.longest_match import LongestMatchEngine, save_world
from functional_llm.tokenizers.sentencepiece_conversion import convert_sentencepiece
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.text import TextTokenizer

# The files of a tokenizer that a directory may have.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    tiktoken_files.FILE_NAME,
    longest_match.FILE_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer.

    Chat templates with names, which may lie in a folder of their own, go into
    tokenizer_config.json.

    Args:
        source: A directory in Hugging Face layout.
        folder: An existing folder.

    Raises:
        ValueError: If a file with chat templates is malformed.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATE_FOLDER).is_dir():
        config = read_json(source / "tokenizer_config.json", {})
        templates = read_chat_template(source, config)
        write_json(folder / "tokenizer_config.json", config | _write_template(templates, folder))


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Writes `tokenizer.json`, the files beside it, and the stop ids.

    Transformers gives the same ids with them, and so does this library. A sentencepiece model is
    written as `tokenizer.model` too, for what reads nothing else. A World vocabulary of RWKV is
    written as its own file: Transformers has no class for it.

    Args:
        tokenizer: The tokenizer.
        folder: An existing folder.

    Raises:
        TypeError: If the tokenizer has an engine of another library.
    """
    kind = "PreTrainedTokenizerFast"
    match tokenizer.engine:
        case TokenizersEngine(tokenizer=inner):
            _save_tokenizers(tokenizer, inner, folder / "tokenizer.json")
        case SentencePieceEngine() as engine:
            inner = convert_sentencepiece(engine.proto, engine.added)
            _save_tokenizers(tokenizer, inner, folder / "tokenizer.json")
            (folder / "tokenizer.model").write_bytes(engine.proto)
        case LongestMatchEngine() as engine:
            save_world(engine, folder)
            kind = "RwkvTokenizer"
        case engine:
            raise TypeError(
                "Expected a tokenizer of the library tokenizers or sentencepiece, or a World "
                f"tokenizer. Received: {type(engine).__name__}. Save it yourself and pass no "
                "tokenizer."
            )
    config: dict[str, Any] = {
        **tokenizer.special_tokens,
        "bos_token": tokenizer.token_text(tokenizer.bos_token_id),
        "eos_token": tokenizer.token_text(tokenizer.eos_token_id),
        "pad_token": tokenizer.token_text(tokenizer.pad_token_id),
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": kind,
    }
    config |= _write_template(tokenizer.chat_template, folder)
    write_json(folder / "tokenizer_config.json", config)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(tokenizer.stop_token_ids) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = {key: x for key, x in ids.items() if x is not None}
    write_json(folder / "generation_config.json", ids)


def _save_tokenizers(tokenizer: TextTokenizer, inner: tokenizers.Tokenizer, path: Path) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or not tokenizer.add_bos or inner.encode("").ids[:1] == [bos]:
        inner.save(str(path))
        return
    # Transformers puts BOS first only with a post-processor, which is not in GGUF files.
    name = inner.id_to_token(bos)
    processor = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
    )
    state = json.loads(processor.__getstate__())
    write_json(path, json.loads(inner.to_str()) | {"post_processor": state})


def _write_template(template: str | Mapping[str, str] | None, folder: Path) -> dict[str, Any]:
    """Writes the file of a chat template; returns what tokenizer_config.json is to hold of it."""
    path = folder / "chat_template.jinja"
    if isinstance(template, Mapping):
        path.unlink(missing_ok=True)  # it would hide these
        return {"chat_template": [{"name": x, "template": text} for x, text in template.items()]}
    if template is not None:
        path.write_text(template, encoding="utf-8")
    return {}
