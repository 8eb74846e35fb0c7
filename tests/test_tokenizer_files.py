"""The files of a tokenizer mean what they mean to Transformers, both ways."""

import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from functional_llm.tokenizers import TextTokenizer, copy_tokenizer, save_tokenizer
from functional_llm.tokenizers.sentencepiece_conversion import convert_sentencepiece

transformers = pytest.importorskip("transformers")

CORPUS = [
    "Once upon a time, there was a little girl named Lily. She didn't know what to do.",
    "The quick brown fox jumps over the lazy dog; 12345 times!  Twice\n\n\tas fast.",
    "Привет, мир! 你好，世界。 Ça va? naïve café 😀 ❤️",
]
PARTS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<ud>", "<brand>", "<x>", "<pad>", "<b>"]
PARTS += [
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "Lily",
    "Once",
    " upon",
    "1",
    "▁",
    "é",
    "e\u0301",
    "你好",
    "😀",
    "ﬁ",
]
NUM_PIECES = 400


def _texts(count: int) -> list[str]:
    rng = random.Random(count)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count)]


def check_same(ours: TextTokenizer, theirs: Any, count: int = 60) -> None:
    for text in _texts(count):
        for parse in (True, False):
            ids = theirs(text, add_special_tokens=False, split_special_tokens=not parse).input_ids
            assert ours.encode(text, parse_special=parse) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocabulary_size == len(theirs)


def _check_saved(ours: TextTokenizer, folder: Path) -> None:
    """Checks that Transformers, and we, read the same from what is saved."""
    folder.mkdir()
    save_tokenizer(ours, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    check_same(ours, theirs)
    again = TextTokenizer.from_directory(folder)
    check_same(again, theirs, 20)
    assert (again.bos_token_id, again.add_bos) == (ours.bos_token_id, ours.add_bos)
    assert (again.stop_token_ids, again.pad_token_id) == (ours.stop_token_ids, ours.pad_token_id)
    assert again.special_tokens == ours.special_tokens == theirs.special_tokens_map
    if ours.add_bos:
        assert theirs("a").input_ids == ours.encode("a", add_bos=True)


@cache
def sentencepiece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": NUM_PIECES,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, **{**settings, **options}
    )
    return model.getvalue()


def _byte_pairs() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        show_progress=False,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def _write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}


def _described(first: int, known: str = "<s>") -> dict[str, Any]:
    return {
        "1": _token(known, rstrip=True, special=True),
        str(first): _token("<brand>", lstrip=True),
        str(first + 1): _token("<x>", rstrip=True, single_word=True, normalized=True),
        str(first + 2): _token("<pad>", special=True),
    }


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA |= {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"legacy": False},
        {"legacy": True},
        {"legacy": False, "add_prefix_space": False},
        {"legacy": True, "add_prefix_space": None, "added_tokens_decoder": _described(NUM_PIECES)},
        {"legacy": False, "added_tokens_decoder": _described(NUM_PIECES), "pad_token": "<pad>"},
    ],
)
def test_a_sentencepiece_model_of_llama(tmp_path: Path, facts: dict[str, Any]) -> None:
    proto = sentencepiece_model(user_defined_symbols="<ud>")
    (tmp_path / "tokenizer.model").write_bytes(proto)
    _write(tmp_path, {"tokenizer_config.json": LLAMA | facts})
    ours = TextTokenizer.from_directory(tmp_path)
    check_same(ours, transformers.LlamaTokenizer.from_pretrained(tmp_path))
    assert ours.add_bos
    _check_saved(ours, tmp_path / "saved")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_json_of_llama(tmp_path: Path, legacy: bool) -> None:
    # The file puts a space before each part; the class has it its own way.
    convert_sentencepiece(sentencepiece_model(), {}).save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, {"tokenizer_config.json": LLAMA | {"legacy": legacy}})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    check_same(TextTokenizer.from_directory(tmp_path), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
)
def test_what_is_saved_of_anothersentencepiece_model(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    files = {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "added_tokens.json": {"<pad>": NUM_PIECES, "<brand>": NUM_PIECES + 1},
    }
    ours = TextTokenizer.from_directory(_write(tmp_path, files))
    assert ours.encode(" a b") == ours.engine.processor.encode(" a b")  # type: ignore[attr-defined]
    _check_saved(ours, tmp_path / "saved")


def test_what_is_saved_of_a_gguf_file(tmp_path: Path) -> None:
    proto = sentencepiece_model(user_defined_symbols="<ud>")
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokens = [model.id_to_piece(i) for i in range(model.vocab_size())]
    kinds = [6 if model.is_byte(i) else 3 if model.is_control(i) else 1 for i in range(len(tokens))]
    kinds[0], kinds[tokens.index("<ud>")] = 2, 4
    ours = TextTokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(tokens))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": "a",
            "tokenizer.chat_template.tool_use": "b",
        }
    )
    assert ours.chat_template == {"default": "a", "tool_use": "b"}
    assert ours.special_tokens["unk_token"] == "<unk>"
    # A space is put before each part, where llama.cpp puts it.
    assert ours.decode(ours.encode("a<ud>b")) == "a<ud> b"
    _check_saved(ours, tmp_path / "saved")


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_sentencepiece_tokenizer_is_pickled_and_copied(
    tmp_path: Path, make: Callable[[TextTokenizer], TextTokenizer]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    files = {"tokenizer_config.json": {"added_tokens_decoder": _described(NUM_PIECES)}}
    ours = TextTokenizer.from_directory(_write(tmp_path, files))
    other = make(ours)
    for text in _texts(20):
        assert other.encode(text, parse_special=True) == ours.encode(text, parse_special=True)
    assert other.engine.special_ids == ours.engine.special_ids
    _check_saved(ours, tmp_path / "saved")


def test_ids_without_tokens_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    _write(tmp_path, {"added_tokens.json": {"<pad>": NUM_PIECES + 7}})
    ours = TextTokenizer.from_directory(tmp_path)
    assert ours.encode("<pad>") == [NUM_PIECES + 7]
    with pytest.raises(ValueError, match="a token for each id up to 407.*none before '<pad>'"):
        save_tokenizer(ours, tmp_path)


PLAIN = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
}
ADDED_TYPE = {"__type": "AddedToken"}
ADDED: list[Callable[[int], dict[str, Any]]] = [
    lambda n: {"added_tokens.json": {"<brand>": n}},
    lambda n: {"added_tokens.json": {"<brand>": n, "<pad>": n + 1}, "pad_token": "<pad>"},
    lambda n: {"pad_token": "<pad>", "unk_token": "<x>"},
    lambda n: {"extra_special_tokens": ["<x>", "<brand>"]},
    lambda n: {"additional_special_tokens": ["<x>", _token("<brand>", lstrip=True) | ADDED_TYPE]},
    lambda n: {"extra_special_tokens": {"image_token": "<x>"}, "audio_token": "<brand>"},
    lambda n: {"bos_token": _token("<b>", lstrip=True, rstrip=True) | ADDED_TYPE},
    lambda n: {"added_tokens_decoder": _described(n, "<|im_start|>"), "pad_token": "<pad>"},
    lambda n: {"special_tokens_map.json": {"pad_token": _token("<pad>", lstrip=True)}},
    lambda n: {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "unk_token": "<s>"},
]


@pytest.mark.parametrize("added", ADDED)
def test_tokens_beside_a_tokenizer_json(
    tmp_path: Path, added: Callable[[int], dict[str, Any]]
) -> None:
    tokenizer = _byte_pairs()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    facts = added(tokenizer.get_vocab_size())
    files = {name: facts.pop(name) for name in list(facts) if name.endswith(".json")}
    _write(tmp_path, {**files, "tokenizer_config.json": PLAIN | facts})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TextTokenizer.from_directory(tmp_path)
    check_same(ours, theirs)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.engine.special_ids == special
    _check_saved(ours, tmp_path / "saved")


def test_a_token_that_is_not_special_is_one_id_and_kept_in_text(tmp_path: Path) -> None:
    tokenizer = _byte_pairs()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    ours = TextTokenizer.from_directory(_write(tmp_path, {"added_tokens.json": {"<brand>": size}}))
    for parse in (True, False):
        ids = ours.encode("a <brand>!", parse_special=parse)
        assert ids.count(size) == 1
        assert ours.decode(ids) == "a <brand>!"


def test_ids_above_the_vocabulary_have_no_text(tmp_path: Path) -> None:
    _byte_pairs().save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer.from_directory(_write(tmp_path, {"tokenizer_config.json": PLAIN}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [*ours.encode("Li"), ours.vocabulary_size, 10**6, *ours.encode("ly")]
    assert ours.decode(ids) == theirs.decode(ids) == "Lily"


def test_offsets_are_places_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    _byte_pairs().save(str(tmp_path / "json" / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    for folder in (tmp_path / "json", tmp_path):
        ours = TextTokenizer.from_directory(_write(folder, {"tokenizer_config.json": PLAIN}))
        text = "Once 😀<|im_end|> upon 你好\n a<s>"
        ids, offsets = ours.encode_with_offsets(text, add_bos=True, parse_special=True)
        assert ids == ours.encode(text, add_bos=True, parse_special=True)
        assert (ids[0], offsets[0]) == (ours.bos_token_id, (0, 0))
        assert {place for span in offsets for place in range(*span)} == set(range(len(text)))
        end = offsets[[ours.token_id("<|im_end|>") == i for i in ids].index(True)]
        assert text[slice(*end)] == "<|im_end|>"
        assert ours.encode("<s>a", add_bos=True, parse_special=True).count(ids[0]) == 1


def test_templates_with_names_are_copied_and_saved(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    _byte_pairs().save(str(source / "tokenizer.json"))
    _write(source, {"tokenizer_config.json": PLAIN | {"model_max_length": 77}})
    (source / "chat_template.jinja").write_text("a")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    templates = {"default": "a", "tool_use": "b"}
    for name in ("copied", "saved"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "copied":
            copy_tokenizer(source, folder)
            assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
        else:
            save_tokenizer(TextTokenizer.from_directory(source), folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert TextTokenizer.from_directory(folder).chat_template == templates
        assert theirs.chat_template == templates
