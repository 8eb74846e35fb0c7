"""What classes of Transformers change in the files that they read.

Its `LlamaTokenizer` and `GPT2Tokenizer` take vocabulary, merges and added tokens from the files.
How they put spaces before text is up to their arguments in tokenizer_config.json. Models are
trained with the result.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from functional_llm.tokenizers.engines import SPACE
from functional_llm.tokenizers.sentencepiece_conversion import PrependScheme


def llama_scheme(config: Mapping[str, Any], model: Mapping[str, Any]) -> PrependScheme | None:
    """Returns where LlamaTokenizer puts spaces; `None` if Transformers takes another class.

    Args:
        config: What tokenizer_config.json holds.
        model: What config.json holds.
    """
    # The files of other models name this class, too. Transformers reads their tokenizer.json as it
    # is.
    is_llama = model.get("model_type", "llama") == "llama"
    if class_name(config, model) != "LlamaTokenizer" or not is_llama:
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def read_as_class(text: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Returns a tokenizer.json as the class that the files name reads it.

    Args:
        text: The file's content.
        config: What tokenizer_config.json holds.
        model: What config.json holds.
    """
    scheme, is_byte_level = llama_scheme(config, model), '"ByteLevel"' in text
    if scheme is not None and not is_byte_level:
        return json.dumps(_read_as_llama(json.loads(text), scheme))
    if is_gpt2(config, model) and "add_prefix_space" in config:
        content = json.loads(text)
        words = content.get("pre_tokenizer") or {}
        if words.get("type") == "ByteLevel":
            words["add_prefix_space"] = bool(config["add_prefix_space"])
        return json.dumps(content)
    return text


def is_gpt2(config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether Transformers takes its GPT2Tokenizer.

    Args:
        config: What tokenizer_config.json holds.
        model: What config.json holds.
    """
    return class_name(config, model) == "GPT2Tokenizer"


def gpt2_tokenizer(model: tokenizers.models.BPE, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns what GPT2Tokenizer makes of a vocabulary alone.

    Args:
        model: Tokens and merges.
        config: What tokenizer_config.json holds.
    """
    tokenizer = tokenizers.Tokenizer(model)
    prefix = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def class_name(config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Returns the class that the files name, without "Fast".

    Args:
        config: What tokenizer_config.json holds.
        model: What config.json holds.
    """
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None and model.get("model_type") in ("gpt2", "opt"):
        name = "GPT2Tokenizer"
    if name is None and (model.get("model_type") == "llama" or "legacy" in config):
        name = "LlamaTokenizer"
    return None if name is None else str(name).removesuffix("Fast")


def _read_as_llama(content: dict[str, Any], scheme: PrependScheme) -> dict[str, Any]:
    if content["model"].get("type") != "BPE":
        return content
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return content | {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": steps[:3] if scheme == "never" else steps},
        "model": content["model"] | {"fuse_unk": True, "byte_fallback": True},
    }
