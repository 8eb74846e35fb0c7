"""Tokenizers of the published models: small vocabularies with the settings of each, and templates.

The settings are those of the models' own tokenizer.json and tokenizer_config.json, as Transformers
and public projects show them; the vocabularies are trained here.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from test_tokenizer_files import CORPUS, check_same, sentencepiece_model

transformers = pytest.importorskip("transformers")

JSON = dict[str, Any]
SPECIAL = ["<|endoftext|>", "<|user|>", "<|end|>", "<pad>"]
# The regular expressions of the models' own files.
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
CL100K = CONTRACTIONS + WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
SEED = CONTRACTIONS + WORDS + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES
QWEN2 = CONTRACTIONS + WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
ENDING = CONTRACTIONS.replace(")|", ")?|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + ENDING
    + r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + ENDING
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + SPACES
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
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
    "glm4_moe": ("glm4_moe", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, FAST),
    "olmo2": ("olmo2", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, GPT2 | ENDS),
    "olmo3": ("olmo3", {"pre_tokenizer": _in_turn(_split(CL100K), _bytes())}, GPT2 | ENDS),
    "smollm3": (
        "smollm3",
        {
            "pre_tokenizer": _in_turn(_split(CL100K), _bytes()),
            "ignore_merges": True,
        },
        FAST | {"bos_token": None, "eos_token": "<|end|>"},
    ),
    "granite": ("granite", {"pre_tokenizer": _in_turn(DIGITS, _bytes(True))}, GPT2 | ENDS),
    "granitemoe": ("granitemoe", {"pre_tokenizer": _in_turn(DIGITS, _bytes(True))}, GPT2 | ENDS),
    "gpt_oss": (
        "gpt_oss",
        {"pre_tokenizer": _in_turn(_split(O200K), _bytes())},
        FAST | {"bos_token": "<|user|>", "eos_token": "<|end|>", "pad_token": "<|endoftext|>"},
    ),
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
    "deepseek_v3": (
        "deepseek_v3",
        {
            "pre_tokenizer": _in_turn(
                _split(r"\p{N}{1,3}"),
                _split("[一-龥\u3040-ゟ゠-ヿ]+"),
                _split(DEEPSEEK3),
                _bytes(),
            ),
            "post_processor": BOS,
        },
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True, **ENDS}
        | {"add_eos_token": False, "eos_token": "<|end|>", "pad_token": "<|end|>"},
    ),
    "cohere": (
        "cohere",
        {
            "normalizer": NFC,
            "pre_tokenizer": _in_turn(DIGITS, _bytes(True)),
            "post_processor": BOS,
        },
        {"tokenizer_class": "CohereTokenizerFast", "add_bos_token": True, **ENDS}
        | {"add_prefix_space": False, "eos_token": "<|end|>", "pad_token": "<pad>"}
        | dict.fromkeys(("cls_token", "sep_token", "mask_token"), "<|user|>"),
    ),
    "pythia": (
        "gpt_neox",
        {"normalizer": NFC, "pre_tokenizer": _bytes(True)},
        {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **ENDS}
        | {"pad_token": "<pad>"},
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
    "llama4": (
        "llama4_text",
        {"pre_tokenizer": _in_turn(_split(O200K), _bytes()), "post_processor": BOS},
        FAST | ENDS | {"eos_token": "<|end|>", "pad_token": "<pad>"},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"normalizer": NFC, "pre_tokenizer": _in_turn(_split(QWEN2), _bytes())},
        {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "errors": "replace"}
        | {"bos_token": None, "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
        | {"unk_token": None, "split_special_tokens": False},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"normalizer": NFC, "pre_tokenizer": _in_turn(_split(QWEN2), _bytes())},
        {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "errors": "replace"}
        | {"bos_token": None, "eos_token": "<|end|>", "pad_token": "<|endoftext|>"}
        | {"unk_token": None, "add_prefix_space": False},
    ),
    "olmoe": (
        "olmoe",
        {"normalizer": NFC, "pre_tokenizer": _bytes(True)},
        {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **ENDS}
        | {"add_bos_token": False, "add_eos_token": False, "bos_token": None}
        | {"pad_token": "<pad>"},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "pre_tokenizer": _in_turn(
                _split("[\r\n]"),
                _split(r"\s?\p{L}+"),
                _split(r"\s?\p{P}+"),
                _split("[一-龥ࠀ-一가-퟿]+"),
                {"type": "Digits", "individual_digits": True},
                _bytes(),
            ),
            "post_processor": BOS,
        },
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True, **ENDS}
        | {"add_eos_token": False, "eos_token": "<|end|>", "pad_token": "<|end|>"},
    ),
    "lfm2": (
        "lfm2",
        {
            "pre_tokenizer": _in_turn(_split(CL100K), _bytes()),
            "ignore_merges": True,
            "post_processor": BOS,
        },
        FAST
        | ENDS
        | {"eos_token": "<|end|>", "pad_token": "<pad>", "legacy": False}
        | {"use_default_system_prompt": False, "add_bos_token": True, "sp_model_kwargs": {}},
    ),
    "apertus": (
        "apertus",
        {
            "pre_tokenizer": _in_turn(_split(TEKKEN), _bytes()),
            "ignore_merges": True,
            "post_processor": BOS,
        },
        FAST | ENDS | {"eos_token": "<|end|>", "pad_token": "<pad>"},
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
    for text in ("Lily 12345.", ""):
        with_bos = ours.encode(text, add_bos=ours.add_bos, parse_special=True)
        assert with_bos == theirs(text).input_ids, text
    return ours


# Families whose files name GPT2Tokenizer, though their text is cut otherwise.
MORE_THAN_GPT2: dict[str, tuple[str, JSON, JSON]] = {
    "starcoder2": ("starcoder2", {"pre_tokenizer": _in_turn(DIGITS, _bytes(True))}, GPT2 | ENDS),
    "exaone4": (
        "exaone4",
        {"normalizer": NFC, "pre_tokenizer": _in_turn(_split(CL100K), _bytes())},
        GPT2 | ENDS | {"pad_token": "<pad>"},
    ),
}


@pytest.mark.parametrize("name", MORE_THAN_GPT2)
def test_a_class_does_not_change_how_a_model_was_trained(name: str, tmp_path: Path) -> None:
    """Transformers 5 keeps the vocabulary alone there, and cuts numbers as GPT-2 does.

    Transformers 4 and llama.cpp, which calls these cuts "starcoder" and "exaone4", do not.
    """
    _save(tmp_path, *MORE_THAN_GPT2[name])
    ours = TextTokenizer.from_directory(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*CORPUS, "12345 cafe\u0301", "Lily's 2024 dogs"]:
        assert ours.encode(text) == library.encode(text).ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("12345").input_ids != ours.encode("12345")


# Models whose vocabulary was made by sentencepiece: what tokenizer_config.json says beside it.
_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_STRIPPED = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
_PHI3: JSON = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
_PHI3 |= {**_ENDS, "eos_token": "<|end|>", "pad_token": "<|end|>", "sp_model_kwargs": {}}
_PHI3 |= {
    "added_tokens_decoder": {
        "0": {"content": "<unk>", **_STRIPPED, "rstrip": False, "special": True},
        "1": {"content": "<s>", **_STRIPPED, "rstrip": False, "special": True},
        "2": {"content": "</s>", **_STRIPPED, "special": False},
        "3": {"content": "<|end|>", **_STRIPPED, "rstrip": False, "special": True},
        "4": {"content": "<|user|>", **_STRIPPED, "special": True},
    }
}
SENTENCES: dict[str, tuple[str, JSON]] = {
    "phi3": ("phi3", _PHI3),
    "phimoe": ("phimoe", _PHI3),
    "mixtral": (
        "mixtral",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **_ENDS}
        | {"add_eos_token": False, "use_default_system_prompt": False},
    ),
    "nemotron": ("nemotron", FAST | _ENDS | {"clean_up_tokenization_spaces": False}),
    "llama2": ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, **_ENDS}),
    "mistral_v0.1": (
        "mistral",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **_ENDS},
    ),
    "minicpm3": (
        "minicpm3",
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True, **_ENDS},
    ),
    "ernie4_5": (
        "ernie4_5",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False, **_ENDS}
        | {"add_bos_token": False},
    ),
}


@cache
def _sentence_pieces() -> str:
    """A byte-pair vocabulary as Transformers makes it of a sentencepiece model."""
    special = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=520,
        show_progress=False,
        special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
    )
    words = [word for text in CORPUS for word in re.findall(" ?[^ ]+", text)]
    tokenizer.train_from_iterator(words * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    return json.dumps(content)


@pytest.mark.parametrize("name", SENTENCES)
def test_settings_of_the_families_with_sentencepiece(name: str, tmp_path: Path) -> None:
    model_type, config = SENTENCES[name]
    content = json.loads(_sentence_pieces())
    if config.get("add_bos_token"):
        content["post_processor"] = json.loads(
            json.dumps(BOS).replace("<|endoftext|>", "<s>").replace("[0]", "[1]")
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    _check(tmp_path)


def test_a_vocabulary_and_merges_are_all_that_opt_has(tmp_path: Path) -> None:
    model = json.loads(_byte_pairs(("<s>", "<pad>", "</s>", "<unk>")))["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    token: JSON = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    token |= {"__type": "AddedToken"}
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config: JSON = {key: {"content": text, **token} for key, text in names.items()}
    config |= {"errors": "replace", "add_prefix_space": False, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ours = _check(tmp_path)
    assert ours.add_bos and ours.bos_token_id == 2
    (tmp_path / "merges.txt").write_text("not a merge of this vocabulary\n")
    with pytest.raises(ValueError, match="vocab.json, and merges.txt of its tokens"):
        TextTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_settings_of_the_families(name: str, tmp_path: Path) -> None:
    _save(tmp_path, *BYTE_LEVEL[name])
    _check(tmp_path)


def _cpp_cases(source: str) -> list[dict[str, str]]:
    """Returns the cases of llama.cpp's own test of chat templates: text by field."""
    cases: list[dict[str, str]] = []
    literal = r'(?:u8|U8C\()?"((?:[^"\\]|\\.)*)"\)?'
    _, _, source = source.partition("test_cases {")
    for field, text in re.findall(r"/\* \.(\w+)=? \*/\s*" + literal, source):
        if field == "name":
            cases.append({})
        cases[-1][field] = json.loads('"' + text.replace("\\'", "'") + '"')
    return cases


@pytest.mark.real
def test_templates_of_llama_cpps_own_test(llama_cpp: Path) -> None:
    """Phi-3 and 4, GLM-4, Granite, Command R, Gemma, Mistral and others, several turns."""
    render = transformers.utils.chat_template_utils.render_jinja_template
    source = (llama_cpp / "tests" / "test-chat-template.cpp").read_text("utf-8")
    turns = ["You are a helpful assistant", "Hello", "Hi there", "Who are you"]
    turns += ["   I am an assistant   ", "Another question"]
    roles = ["system", *["user", "assistant"] * 2, "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    as_expected = set()
    for case in _cpp_cases(source):
        text, expected = case["template_str"], case.get("expected_output_jinja")
        options = {key: case.get(key, "") for key in ("bos_token", "eos_token")}
        for given in (messages, messages[1:]):
            variables: JSON = {"add_generation_prompt": True, **options}
            try:
                (theirs,), _ = render([given], chat_template=text, **variables)
            except Exception:
                # It takes no system message, or what llama.cpp alone knows.
                continue
            ours = ChatTemplate(text).render_marked(given, **variables).text
            assert ours == theirs, case["name"]
            if ours == (expected or case["expected_output"]):
                as_expected.add(case["name"])
    assert len(as_expected) >= 22
    assert {"phi-4", "ChatGLM4", "CohereForAI/c4ai-command-r-plus"} <= as_expected


_CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
_CITY = {"city": {"type": "string", "description": "A city."}}
_PARAMETERS = {"type": "object", "properties": _CITY, "required": ["city"]}
_TOOL = {"name": "weather", "description": "The weather.", "parameters": _PARAMETERS}
_TURNS: list[JSON] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And you?"},
]
_WITH_CALL: list[JSON] = [
    {"role": "system", "content": "Be brief."},
    *_TURNS,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "abcdefghi", "function": _CALL}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "grey"},
    {"role": "assistant", "content": "Grey.", "reasoning_content": "So it is."},
    {"role": "user", "content": "Thanks"},
]


# What the names of the files begin with, of models of the zoo.
_OF_THE_ZOO = """Apertus ByteDance CohereForAI GLM-4.6 HuggingFaceTB Kimi-K2-Instruct
    LFM2.5-Instruct Mistral-Small Qwen-Qwen2.5 Qwen-Qwen3 Qwen3-Coder
    deepseek-ai-DeepSeek-R1-Distill-Qwen deepseek-ai-DeepSeek-V3.1 google-gemma-2
    ibm-granite-granite-3 meta-llama-Llama-3.3 microsoft-Phi-3.5 mistralai-Ministral
    mistralai-Mistral-Nemo"""


@pytest.mark.real
@pytest.mark.parametrize("name", _OF_THE_ZOO.split())
def test_templates_of_published_models(llama_cpp: Path, name: str) -> None:
    """Several turns, a system message, a call of a tool and its answer."""
    render = transformers.utils.chat_template_utils.render_jinja_template
    ends = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    file = sorted((llama_cpp / "models" / "templates").glob(f"{name}*.jinja"))[0]
    text = file.read_text("utf-8")
    template, tool = ChatTemplate(text), {"type": "function", "function": _TOOL}
    rendered = 0
    for given, tools in ((_TURNS, None), (_WITH_CALL[:4], None), (_WITH_CALL, [tool])):
        variables: JSON = {**ends, "enable_thinking": tools is not None}
        try:
            (theirs,), _ = render([given], tools=tools, chat_template=text, **variables)
        except Exception:
            with pytest.raises(ValueError):
                template.render_marked(given, tools=tools, **variables)
            continue
        assert template.render_marked(given, tools=tools, **variables).text == theirs
        rendered += 1
    assert rendered


def test_pieces_of_ernie_are_those_of_sentencepiece(tmp_path: Path) -> None:
    """The class in ERNIE 4.5 21B's repository leaves all but special tokens to it."""
    proto = sentencepiece_model(add_dummy_prefix=False, user_defined_symbols="<|begin|>,<|end|>")
    (tmp_path / "tokenizer.model").write_bytes(proto)
    config: JSON = {"tokenizer_class": "Ernie4_5_Tokenizer", "add_bos_token": False, **_ENDS}
    config |= {"cls_token": "<|begin|>", "sep_token": "<|end|>"}
    config["chat_template"] = (
        "{{ cls_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_moe"}))
    ours = TextTokenizer.from_directory(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode(text)
    turn = [{"role": "user", "content": CORPUS[0]}]
    ids = ours.apply_chat_template(turn, add_generation_prompt=False, tokenize=True)
    assert ids == [theirs.piece_to_id("<|begin|>"), *theirs.encode(f"user: {CORPUS[0]}")]
    assert not ours.add_bos


@pytest.mark.real
def test_the_template_of_gpt_oss(llama_cpp: Path) -> None:
    """Harmony as OpenAI published it: channels, reasoning, a call of a tool and its answer."""
    render = transformers.utils.chat_template_utils.render_jinja_template
    text = (llama_cpp / "models/templates/openai-gpt-oss-120b.jinja").read_text("utf-8")
    messages: list[JSON] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi.", "thinking": "A greeting."},
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "thinking": "A call.",
            "tool_calls": [{"type": "function", "function": _CALL}],
        },
        {"role": "tool", "content": {"sky": "grey"}},
        {"role": "assistant", "content": "Grey.", "thinking": "So it is."},
    ]
    for given, asks in ((messages[:2], True), (messages[:6], True), (messages, False)):
        variables: JSON = {"add_generation_prompt": asks, "reasoning_effort": "low"}
        tools = [{"type": "function", "function": _TOOL}]
        (theirs,), _ = render([given], tools=tools, chat_template=text, **variables)
        ours = ChatTemplate(text).render_marked(given, tools=tools, **variables).text
        assert ours == theirs
        assert "Reasoning: low" in ours and "namespace functions" in ours
        assert ours.endswith("<|start|>assistant" if asks else "Grey.<|return|>")
