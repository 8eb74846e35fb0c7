"""Vocabularies of tiktoken, as Kimi K2 and Moonlight were published with."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from functional_llm.tokenizers import TOKENIZER_FILES, TextTokenizer, copy_tokenizer
from functional_llm.tokenizers.engines import BYTE_ALPHABET
from test_tokenizer_files import CORPUS

tiktoken = pytest.importorskip("tiktoken")

# As `tokenization_kimi.py` has it.
HAN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
UNHAN = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{HAN}*{UNHAN}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{HAN}+{UNHAN}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMES = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "[PAD]"]
TEXTS = [
    *CORPUS,
    "Lily's 2024 dogs, 12345678 can't!\n\n  你好世界，歡迎 Kimi K2 中文English混合 ",
    "aaaa aaaaa  \t\r\n café naïve ÄÖÜ 🎉🚀 def f(x): return x\n",
    "",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=520,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([*TEXTS * 4, "aaaa aaa aa"], trainer)
    words = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [
        f"{base64.b64encode(bytes(map(BYTE_ALPHABET.__getitem__, x))).decode()} {rank}"
        for x, rank in words
    ]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    table = {
        str(len(words) + i): {"content": name, "special": i != 3, **flags}
        for i, name in enumerate(NAMES)
    }
    config: dict[str, Any] = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": table}
    config |= {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    return tmp_path


def test_ids_are_those_of_tiktoken(folder: Path) -> None:
    lines = [line.split() for line in (folder / "tiktoken.model").read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    behind = dict(enumerate(NAMES, len(ranks)))
    special = {
        behind.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), len(ranks) + 258)
    }
    theirs = tiktoken.Encoding(
        "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    ours = TextTokenizer.from_directory(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text
    turn = "<|im_user|>Hello<|im_end|> [EOS]<|reserved_token_600|>"
    assert ours.encode(turn, parse_special=True) == theirs.encode(turn, allowed_special="all")
    assert ours.vocabulary_size == len(ranks) + 258
    assert not ours.add_bos and ours.eos_token_id == special["[EOS]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("YWJj", "values to unpack"), ("!!! 7", "base64"), ("enp6eno= 9000", "ids with gaps")],
)
def test_a_malformed_file(folder: Path, line: str, message: str) -> None:
    path = folder / "tiktoken.model"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"is malformed. Expected: lines of a token.*{message}"):
        TextTokenizer.from_directory(folder)


def test_what_a_tokenizer_needs_is_fetched_and_copied(folder: Path, tmp_path: Path) -> None:
    """Both take `TOKENIZER_FILES`."""
    assert {path.name for path in folder.iterdir()} <= {"config.json", *TOKENIZER_FILES}
    (copy := tmp_path / "copy").mkdir()
    copy_tokenizer(folder, copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    ours, copied = map(TextTokenizer.from_directory, (folder, copy))
    assert all(ours.encode(text) == copied.encode(text) for text in TEXTS)
