"""Tokenizers of the published models: small vocabularies with the settings of each, and templates.

The settings are those of the models' own tokenizer.json and tokenizer_config.json, as Transformers
and public projects show them; the vocabularies are trained here.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from test_tokenizer_files import CORPUS, check_same

transformers = pytest.importorskip("transformers")

JSON = dict[str, Any]
SPECIAL = ["<|endoftext|>", "<|user|>", "<|end|>", "<pad>"]
# The regular expressions of the models' own files.
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
CL100K = CONTRACTIONS + WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
SEED = CONTRACTIONS + WORDS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _split(pattern: str) -> JSON:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _bytes(use_regex: bool = False, prefix: bool = False) -> JSON:
    options = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


def _in_turn(*steps: JSON) -> JSON:
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
FALCON = _in_turn(
    PUNCTUATION,
    _bytes(use_regex=True),
    {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
ENDS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    },
}
# Family -> its model_type, what its tokenizer.json says beside the vocabulary, and its config.
BYTE_LEVEL: dict[str, tuple[str, JSON, JSON]] = {
    "glm4": ("glm4", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, FAST),
    "olmo2": ("olmo2", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, GPT2 | ENDS),
    "olmo3": ("olmo3", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, GPT2 | ENDS),
    "smollm3": (
        "smollm3",
        {
            "pre_tokenizer": _in_turn(_split(CL100K), _bytes()),
            "ignore_merges": True,
            "post_processor": BOS,
        },
        FAST | {"bos_token": None, "eos_token": "<|end|>", "clean_up_tokenization_spaces": True},
    ),
    "granite": ("granite", {"pre_tokenizer": _in_turn(DIGITS, _bytes(True))}, GPT2 | ENDS),
    "seed_oss": (
        "seed_oss",
        {"pre_tokenizer": _in_turn(_split(SEED), _bytes())},
        FAST | {"bos_token": "<|user|>", "eos_token": "<|end|>", "pad_token": "<pad>"},
    ),
    "hunyuan": (
        "hunyuan_v1_dense",
        {
            "pre_tokenizer": _in_turn(
                _split(r"\p{N}{1,3}"),
                _split("[一-龥\u3040-ゟ゠-ヿ]+"),
                _split(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES),
                _bytes(),
            )
        },
        FAST | ENDS,
    ),
    "mistral_small": (
        "mistral3",
        {
            "pre_tokenizer": _in_turn(_split(TEKKEN), _bytes()),
            "ignore_merges": True,
            "post_processor": BOS,
        },
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_prefix_space": True}
        | {"add_bos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|end|>"},
    ),
    "ministral3": (
        "mistral3",
        {"pre_tokenizer": _in_turn(_split(TEKKEN), _bytes()), "ignore_merges": True},
        {"tokenizer_class": "TokenizersBackend", **ENDS},
    ),
    "cohere": (
        "cohere",
        {
            "normalizer": NFC,
            "pre_tokenizer": _in_turn(DIGITS, _bytes(True)),
            "post_processor": BOS,
        },
        {"tokenizer_class": "CohereTokenizerFast", "add_bos_token": True, **ENDS}
        | {"add_prefix_space": False, "eos_token": "<|end|>", "pad_token": "<pad>"},
    ),
    "pythia": (
        "gpt_neox",
        {"normalizer": NFC, "pre_tokenizer": _bytes(True)},
        {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **ENDS}
        | {"clean_up_tokenization_spaces": True},
    ),
    "falcon": ("falcon", {"pre_tokenizer": FALCON}, FAST | {"eos_token": "<|endoftext|>"}),
    "bloom": (
        "bloom",
        {"pre_tokenizer": _in_turn(_split(BLOOM), _bytes())},
        {"tokenizer_class": "BloomTokenizerFast", "add_prefix_space": False, **ENDS},
    ),
    "phi": ("phi", {"pre_tokenizer": _bytes(True)}, {"tokenizer_class": "CodeGenTokenizer"} | ENDS),
    "phi4": (
        "phi3",
        {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())},
        GPT2 | ENDS | {"eos_token": "<|end|>", "pad_token": "<pad>"},
    ),
    "gptj": ("gptj", {"pre_tokenizer": _bytes(True)}, GPT2 | ENDS),
    "stablelm2": (
        "stablelm",
        {"pre_tokenizer": _in_turn(_split(SEED), _bytes())},
        GPT2 | ENDS | {"errors": "replace"},
    ),
}


@cache
def _byte_pairs(special: tuple[str, ...] = tuple(SPECIAL)) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3 + ["2024 12345 12345 345"] * 9, trainer)
    return tokenizer.to_str()


def _save(folder: Path, model_type: str, settings: JSON, config: JSON) -> JSON:
    content = json.loads(_byte_pairs())
    settings = dict(settings)
    content["model"]["ignore_merges"] = settings.pop("ignore_merges", False)
    content |= settings
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<pad>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return content


def _check(folder: Path) -> TextTokenizer:
    ours = TextTokenizer.from_directory(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    check_same(ours, theirs)
    for text in ("Lily 12345.", "<|endoftext|>a", ""):
        with_bos = ours.encode(text, add_bos=ours.add_bos, parse_special=True)
        assert with_bos == theirs(text).input_ids, text
    return ours


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_settings_of_the_families(name: str, tmp_path: Path) -> None:
    _save(tmp_path, *BYTE_LEVEL[name])
    _check(tmp_path)
