"""Reads the tokenizer of a KerasHub preset: its config, and the assets beside it.

Text is cut into words as the model's authors cut it. KerasHub 0.32 does not: it takes the
expression for a plain string, which no text holds, and in TensorFlow's graphs one like GPT-2's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from functional_llm.files.json_files import read_json
from functional_llm.tokenizers.byte_pairs import byte_pair_engine
from functional_llm.tokenizers.engines import Engine, TokenizerFields
from functional_llm.tokenizers.longest_match import read_world
from functional_llm.tokenizers.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.stop_tokens import stop_token_ids

_CONFIG = "tokenizer.json"
_PREPROCESSORS = ("preprocessor.json", "task.json")  # the second has the first inside


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a class of KerasHub's tokenizers knows that its files do not say.

    Args:
        pre: Name of the pre-tokenizer; `None` for sentencepiece, `_WORLD` for RWKV's.
        bos: Text of the token that begins a text.
        eos: Text of the token that ends one.
        pad: Text of the token that pads.
        stops: Texts of more tokens that end generation, if they are there.
    """

    pre: str | None = None
    bos: str | None = None
    eos: str
    pad: str | None = None
    stops: tuple[str, ...] = ()


_WORLD = "world"
_SENTENCES = _Kind(bos="<s>", eos="</s>")
_GEMMA = _Kind(bos="<bos>", eos="<eos>", pad="<pad>", stops=("<end_of_turn>",))
_QWEN3_5 = _Kind(pre="qwen35", eos="<|im_end|>", pad="<|endoftext|>")
_GPT2 = _Kind(pre="gpt-2", bos="<|endoftext|>", eos="<|endoftext|>")
_QWEN = _Kind(pre="qwen2", eos="<|endoftext|>")
_QWEN3 = _Kind(pre="qwen2", eos="<|im_end|>", pad="<|endoftext|>")
KINDS = {
    "BloomTokenizer": _Kind(pre="bloom", bos="<s>", eos="</s>", pad="<pad>"),
    "FalconTokenizer": _GPT2,  # of Falcon RW, the only one that KerasHub has
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2,
    "Gemma3Tokenizer": _GEMMA,
    "Gemma3nTokenizer": _GEMMA,
    "Gemma4Tokenizer": _Kind(bos="<bos>", eos="<eos>", pad="<pad>", stops=("<turn|>",)),
    "GemmaTokenizer": _GEMMA,
    "Llama3Tokenizer": _Kind(
        pre="llama3", bos="<|begin_of_text|>", eos="<|end_of_text|>", stops=("<|eot_id|>",)
    ),
    "LlamaTokenizer": _SENTENCES,
    "MistralTekkenTokenizer": _Kind(pre="tekken", bos="<s>", eos="</s>"),
    "MistralTokenizer": _SENTENCES,
    "MixtralTokenizer": _SENTENCES,
    "OPTTokenizer": _Kind(pre="gpt-2", bos="</s>", eos="</s>", pad="<pad>"),
    "Phi3Tokenizer": _Kind(bos="<s>", eos="<|endoftext|>", stops=("<|end|>",)),
    "Qwen3Tokenizer": _QWEN3,
    "Qwen3MoeTokenizer": _QWEN3,
    "Qwen3_5MoeTokenizer": _QWEN3_5,
    "Qwen3_5Tokenizer": _QWEN3_5,
    "QwenTokenizer": _QWEN,
    "QwenMoeTokenizer": _QWEN,
    "RWKVTokenizer": _Kind(pre=_WORLD, eos="\n\n"),
    "SmolLM3Tokenizer": _Kind(pre="llama3", eos="<|end_of_text|>", stops=("<|im_end|>",)),
}


def read_keras_hub_tokenizer(path: Path) -> TokenizerFields:
    """Reads the tokenizer of a KerasHub preset directory.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is malformed, or the tokenizer is of an unknown kind.
    """
    raw = read_json(_asset(path, _CONFIG), advice="Fetch the file again.")
    name, config = raw.get("class_name"), raw.get("config")
    if name not in KINDS or not isinstance(config, dict):
        raise ValueError(
            f"{path / _CONFIG} has an unknown kind of tokenizer. Expected one of: "
            f"{', '.join(KINDS)}. Received: {name!r}. Take the tokenizer of the model's directory "
            "in Hugging Face layout."
        )
    kind, assets = KINDS[name], path / "assets" / Path(str(config.get("config_file", _CONFIG))).stem
    if kind.pre == _WORLD:
        engine: Engine = read_world(_asset(assets, "vocabulary.txt"), {})
    else:
        engine = _sentences(assets) if kind.pre is None else _byte_pairs(assets, kind, config)
    texts = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": kind.pad}
    ids = {key: None if x is None else engine.token_id(x) for key, x in texts.items()}
    missing = [x for key, x in texts.items() if x is not None and ids[key] is None]
    if missing:
        raise ValueError(
            f"{assets}: expected the special tokens of a {name} in the vocabulary. Received: none "
            f"of the names {missing}. Fetch the preset again."
        )
    return {
        "engine": engine,
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ids["eos_token"],
        "pad_token_id": ids["pad_token"] if kind.pad else 0,  # KerasHub pads with the first token
        "add_bos": kind.bos is not None and _adds_start(path),
        "stop_token_ids": stop_token_ids(
            engine, (ids["eos_token"], *(engine.token_id(x) for x in kind.stops))
        ),
        "chat_template": None,
        "special_tokens": {key: text for key, text in texts.items() if text is not None},
    }


def _sentences(assets: Path) -> Engine:
    path = _asset(assets, "vocabulary.spm")
    return SentencePieceEngine(path.read_bytes(), {}, str(path))


def _byte_pairs(assets: Path, kind: _Kind, config: Mapping[str, Any]) -> Engine:
    path = _asset(assets, "vocabulary.json")
    vocabulary = read_json(path, advice="Fetch the file again.")
    lines = _asset(assets, "merges.txt").read_text("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version:")]
    pairs = [(pair[0], pair[1]) for pair in merges if len(pair) == 2]
    made = {left + right for left, right in pairs}
    # What is neither a character of the byte alphabet nor made by a merge was added beside them:
    # special tokens, and GPT-NeoX's for several spaces.
    names = {x for x in vocabulary if len(x) > 1 and x not in made}
    names |= {x for x in config.get("unsplittable_tokens") or () if x in vocabulary}
    added = [
        tokenizers.AddedToken(x, special=not x.isspace(), normalized=False)
        for x in sorted(names, key=vocabulary.__getitem__)
    ]
    pre = PRE_TOKENIZERS[str(kind.pre)]
    if pattern := config.get("split_pattern"):
        pre = PreTokenizer(patterns=(pattern,), ignore_merges=pre.ignore_merges)
    try:
        return byte_pair_engine(vocabulary, pairs, added, pre)
    except ValueError as error:
        raise ValueError(
            f"{assets} is malformed. Expected: merges of tokens into tokens. Received: {error}. "
            "Fetch the files again."
        ) from error


def _adds_start(path: Path) -> bool:
    """Whether the preset's prompts begin with the start token."""
    for name in _PREPROCESSORS:
        raw = read_json(path / name, {}).get("config", {})
        inner = raw.get("preprocessor")
        config = inner.get("config", {}) if isinstance(inner, dict) else raw
        if "add_start_token" in config:
            return bool(config["add_start_token"])
    return True  # KerasHub's default


def _asset(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"The KerasHub preset has no tokenizer, or not all of it: nothing is at "
            f"{folder / name}. Fetch the preset again, with its folder assets."
        )
    return folder / name
