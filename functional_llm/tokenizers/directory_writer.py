"""Writes a tokenizer as files of a directory in Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from functional_llm.files.json_files import read_json, write_json
from functional_llm.tokenizers.engines import SentencePieceEngine, TokenizersEngine
from functional_llm.tokenizers.text import TextTokenizer

# The files of a tokenizer that a directory may have.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` or `tokenizer.model`, the files beside it, and the stop ids.

    Args:
        tokenizer: The tokenizer.
        folder: An existing folder.

    Raises:
        TypeError: If the tokenizer has an engine of another library.
    """
    engine = tokenizer.engine

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else engine.token_bytes(token_id).decode()

    config: dict[str, Any] = {
        "bos_token": text(tokenizer.bos_token_id),
        "eos_token": text(tokenizer.eos_token_id),
        "pad_token": text(tokenizer.pad_token_id),
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(engine, TokenizersEngine):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _save_tokenizers(tokenizer, engine.tokenizer, folder / "tokenizer.json")
    elif isinstance(engine, SentencePieceEngine):
        config["tokenizer_class"] = "LlamaTokenizer"
        config["legacy"] = False
        config["added_tokens_decoder"] = {
            str(i): {"content": content, "special": i in engine.special_ids}
            for content, i in engine.added.items()
        }
        (folder / "tokenizer.model").write_bytes(engine.processor.serialized_model_proto())
    else:
        raise TypeError(
            "Expected a tokenizer of the library tokenizers or sentencepiece. Received: "
            f"{type(engine).__name__}. Save it yourself and pass no tokenizer."
        )
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(tokenizer.stop_token_ids) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = {key: x for key, x in ids.items() if x is not None}
    write_json(folder / "generation_config.json", ids)


def _save_tokenizers(tokenizer: TextTokenizer, inner: tokenizers.Tokenizer, path: Path) -> None:
    inner.save(str(path))
    bos = tokenizer.bos_token_id
    content = read_json(path)
    # Transformers puts BOS first only with a post-processor, which is not in GGUF files.
    if tokenizer.add_bos and bos is not None and inner.encode("").ids[:1] != [bos]:
        name = inner.id_to_token(bos)
        saved = tokenizers.Tokenizer.from_file(str(path))
        saved.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
        )
        content["post_processor"] = json.loads(saved.to_str())["post_processor"]
    write_json(path, content)
