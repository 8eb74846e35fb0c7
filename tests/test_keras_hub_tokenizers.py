"""KerasHub's tokenizers: read out of a preset directory, and beside KerasHub's own."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.formats.gguf_file import open_gguf
from functional_llm.presets.keras_hub_writing import save_keras_hub_preset
from functional_llm.tokenizers.keras_hub_vocabulary import KINDS
from functional_llm.tokenizers.sentencepiece_model import (
    load_sentencepiece,
    make_sentencepiece_proto,
    with_pieces,
)
from tiny import save_tiny, save_tokenizer

keras_hub = pytest.importorskip("keras_hub", reason="make .venv/installed-dev installs it")

TEXTS = ["", " ", "The quick brown fox.", "Zwölf Boxkämpfer,\n\n  日本語 🙂", "  1234567 don't"]


def byte_pairs(folder: Path, *special: str) -> tuple[dict[str, int], list[str]]:
    """Returns a small vocabulary with special tokens behind it, and its merges."""
    save_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = dict(model["vocab"])
    for token in special:
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary, [" ".join(pair) for pair in model["merges"]]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return np.asarray(tokenizer(text)).astype(int).tolist()


def test_every_kind_is_a_class_of_kerashub() -> None:
    assert all(hasattr(keras_hub.tokenizers, name) for name in KINDS)


def test_byte_pairs(tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs(
        tmp_path / "hf",
        *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        *("<|start_header_id|>", "<|end_header_id|>"),
    )
    theirs = keras_hub.tokenizers.Llama3Tokenizer(vocabulary, merges)
    theirs.save_to_preset(tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == ids_of(theirs, text)
        assert ours.decode(ours.encode(text)) == text
    chat = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>Hi<|eot_id|>"
    assert ours.encode(chat, parse_special=True) == ids_of(theirs, chat)
    assert len(ours.encode(chat)) > len(ours.encode(chat, parse_special=True))
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.start_token_id, theirs.end_token_id)
    assert ours.stop_token_ids >= {theirs.end_token_id, theirs.end_token2_id}
    assert ours.add_bos and ours.pad_token_id == 0
    assert ours.special_tokens["bos_token"] == "<|begin_of_text|>"


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("BloomTokenizer", ("<unk>", "<s>", "</s>", "<pad>")),
        ("FalconTokenizer", ("<|endoftext|>",)),
        ("GPTNeoXTokenizer", ("<|endoftext|>",)),
        ("OPTTokenizer", ("<s>", "<pad>", "</s>", "<unk>")),
    ],
)
def test_special_tokens_of_byte_pairs(name: str, special: tuple[str, ...], tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs(tmp_path / "hf", *special)
    theirs = getattr(keras_hub.tokenizers, name)(vocabulary, merges)
    theirs.save_to_preset(tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("brown") == ids_of(theirs, "brown")
    ended = f"brown{theirs.end_token}"
    assert ours.encode(ended, parse_special=True) == ids_of(theirs, ended)
    assert theirs.end_token_id not in ours.encode(ended)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.start_token_id, theirs.end_token_id)
    assert ours.pad_token_id == theirs.pad_token_id and ours.add_bos
    assert theirs.end_token_id in ours.stop_token_ids


def test_what_no_merge_makes_is_a_special_token(tmp_path: Path) -> None:
    """KerasHub's Qwen knows one special token; a chat has others in the same vocabulary."""
    vocabulary, merges = byte_pairs(tmp_path / "hf", "<|endoftext|>")
    theirs = keras_hub.tokenizers.QwenTokenizer(vocabulary, merges)
    theirs.save_to_preset(tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path)
    assert ours.bos_token_id is None and not ours.add_bos
    assert ours.encode("<|im_start|>a", parse_special=True)[0] == vocabulary["<|im_start|>"]
    assert ours.stop_token_ids == {vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]}


def sentences(*more: str) -> bytes:
    """Returns a small sentencepiece model with the special tokens of Gemma, Llama and Phi 3.

    Args:
        *more: Texts of special tokens beside.
    """
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>"]
    tokens = [(name, 2 if name == "<unk>" else 3) for name in names]
    tokens += [(name, 4) for name in ("<end_of_turn>", "<|endoftext|>", "<|user|>", "<|end|>")]
    tokens += [(name, 4) for name in more]
    tokens += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    tokens += [(piece, 1) for piece in ["▁", *"abcdefghT", "▁a", "bc", "▁abc"]]
    return make_sentencepiece_proto(tokens, [-float(i) for i in range(len(tokens))], True)


# Beside what `sentences` has: turns, images and sounds.
GEMMA3N = "<start_of_turn> <mask> [multimodal] <image_soft_token> <start_of_image> <end_of_image>"
GEMMA3N += " <audio_soft_token> <start_of_audio> <end_of_audio>"

GEMMA4 = "<|turn> <turn|> <|image> <|image|> <image|> <|video|>"


@pytest.mark.parametrize(
    ("name", "arguments", "stops"),
    [
        ("Gemma3nTokenizer", {}, {"<eos>", "<end_of_turn>"}),
        ("Gemma4Tokenizer", {}, {"<eos>", "<turn|>"}),
        ("GemmaTokenizer", {}, {"<eos>", "<end_of_turn>"}),
        ("Gemma3Tokenizer", {"has_vision_tokens": False}, {"<eos>", "<end_of_turn>"}),
        ("LlamaTokenizer", {}, {"</s>"}),
        ("Phi3Tokenizer", {}, {"<|endoftext|>", "<|end|>"}),
    ],
)
def test_sentencepiece(
    name: str, arguments: dict[str, Any], stops: set[str], tmp_path: Path
) -> None:
    more = {"Gemma3nTokenizer": GEMMA3N, "Gemma4Tokenizer": GEMMA4}.get(name, "").split()
    theirs = getattr(keras_hub.tokenizers, name)(sentences(*more), **arguments)
    theirs.save_to_preset(tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path)
    for text in [*TEXTS, "abc bad cab", "<|user|>\nabc<|end|>"]:
        assert ours.encode(text) == ids_of(theirs, text), text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.start_token_id, theirs.end_token_id)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.stop_token_ids >= {theirs.token_to_id(stop) for stop in stops}


def test_a_preset_is_written_in_hugging_face_layout_with_its_tokenizer(tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs(tmp_path / "hf", "<|endoftext|>")
    arguments = {"num_layers": 1, "hidden_dim": 16, "intermediate_dim": 16, "num_heads": 2}
    backbone = keras_hub.models.GPT2Backbone(vocabulary_size=len(vocabulary), **arguments)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        keras_hub.tokenizers.GPT2Tokenizer(vocabulary, merges), add_start_token=False
    )
    keras_hub.models.GPT2CausalLM(backbone, preprocessor).save_to_preset(tmp_path / "hub")
    model = flm.Backbone.from_preset(tmp_path / "hub")
    model.save_preset(tmp_path / "ours")
    first, second = (flm.Tokenizer.from_preset(tmp_path / name) for name in ("hub", "ours"))
    assert not first.add_bos  # as its preprocessor says
    for text in TEXTS:
        assert first.encode(text) == second.encode(text)


def renamed(folder: Path, names: dict[str, str]) -> Path:
    """Returns a tiny model whose special tokens have other texts."""
    save_tiny(folder, config="llama_multi_head_tied")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


# Special tokens -> the class that has them, of a Llama 3 with its own and of one with Qwen's.
WRITTEN: dict[str, dict[str, str]] = {
    "Qwen3Tokenizer": {"<s>": "<|endoftext|>"},
    "BytePairTokenizer": {},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_preset_is_written_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = renamed(tmp_path / "hf", WRITTEN[kind])
    model, ours = flm.Backbone.from_preset(folder), flm.Tokenizer.from_preset(folder)
    for _ in range(2):  # the second takes the place of the first
        with nullcontext() if WRITTEN[kind] else pytest.warns(match="No class of KerasHub's"):
            save_keras_hub_preset(model, tmp_path / "hub")
    theirs = keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path / "hub"))
    assert type(theirs).__name__ == kind
    chat = ours.apply_chat_template([{"role": "user", "content": "The lazy dog?"}])
    for text in [*TEXTS[:4], "a fox.\n\nZwei", chat]:
        assert ids_of(theirs, text) == ours.encode(text, parse_special=True)
    hub = keras_hub.models.Backbone.from_preset(str(tmp_path / "hub"))  # its head is tied
    ids = np.array([ours.encode("The quick brown")])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids, bool)}
    with jax.numpy_dtype_promotion("standard"):
        logits = hub.token_embedding(hub(inputs), reverse=True)
    np.testing.assert_allclose(logits, model(ids), atol=1e-4)


@pytest.mark.nightly
def test_the_task_of_a_written_preset_writes_the_same_text(tmp_path: Path) -> None:
    folder = renamed(tmp_path / "hf", WRITTEN["Qwen3Tokenizer"])
    model, ours = flm.Backbone.from_preset(folder), flm.Tokenizer.from_preset(folder)
    save_keras_hub_preset(model, tmp_path / "hub")
    task = keras_hub.models.CausalLM.from_preset(str(tmp_path / "hub"))
    task.compile(sampler="greedy")
    prompt = "The quick brown"
    with jax.numpy_dtype_promotion("standard"):  # which KerasHub needs
        written = task.generate(prompt, max_length=len(ours.encode(prompt)) + 4)
    assert written == prompt + flm.TextGenerator(model, ours).generate(prompt, max_new_tokens=4)
    assert flm.Tokenizer.from_preset(tmp_path / "hub").stop_token_ids == ours.stop_token_ids


# KerasHub leaves the file of the vocabulary open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sentencepiece_presets_are_written(material: Path, tmp_path: Path) -> None:
    """Out of a tokenizer.json, with merges; and out of a GGUF file, as sentencepiece has it."""
    folder = material / "stories260K"
    for i, source in enumerate((folder, folder / "stories260K-f32.gguf")):
        model, ours = flm.Backbone.from_preset(source), flm.Tokenizer.from_preset(source)
        save_keras_hub_preset(model, tmp_path / str(i))
        theirs = keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path / str(i)))
        assert type(theirs).__name__ == "LlamaTokenizer"
        for text in ("Once upon a time, Lily", "Zwölf 日本語 🙂", "two  spaces\n\n", "1234"):
            assert ids_of(theirs, text) == ours.encode(text)
        again = flm.Tokenizer.from_preset(tmp_path / str(i))
        assert (again.add_bos, again.bos_token_id) == (ours.add_bos, ours.bos_token_id)
    model = flm.Backbone.from_preset(folder / "stories260K-f32.gguf")
    hub = keras_hub.models.Backbone.from_preset(str(tmp_path / "1"))
    assert type(hub).__name__ == "LlamaBackbone"


def test_added_tokens_become_tokens_of_sentencepiece() -> None:
    """As of Phi 3, whose words for roles are not in its sentencepiece model."""
    size = 6 + 4 + 256 + 13
    added = {x: (None, size + i) for i, x in enumerate(("<|system|>", "<|assistant|>"))}
    processor = load_sentencepiece(with_pieces(sentences(), added), "the model")
    assert size + 1 in processor.encode("<|assistant|>abc")
    with pytest.raises(ValueError, match=r"cannot have '<\|x\|>' as token"):
        with_pieces(sentences(), {"<|x|>": (None, size + 5)})


def test_bad_tokenizers(tmp_path: Path) -> None:
    vocabulary, merges = byte_pairs(tmp_path / "hf", "<|endoftext|>")
    keras_hub.tokenizers.GPT2Tokenizer(vocabulary, merges).save_to_preset(tmp_path)
    assets, path = tmp_path / "assets" / "tokenizer", tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "class_name": "BertTokenizer"}))
    with pytest.raises(ValueError, match="unknown kind of tokenizer.*'BertTokenizer'"):
        flm.Tokenizer.from_preset(tmp_path)
    path.write_text(json.dumps(raw))
    with (assets / "merges.txt").open("a") as file:
        file.write("no such\n")
    with pytest.raises(ValueError, match="malformed"):
        flm.Tokenizer.from_preset(tmp_path)
    (assets / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges.txt"):
        flm.Tokenizer.from_preset(tmp_path)
    (assets / "merges.txt").write_text("")
    (assets / "vocabulary.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match="special tokens of a GPT2Tokenizer"):
        flm.Tokenizer.from_preset(tmp_path)


# KerasHub's class -> name of llama.cpp's vocabulary, and whether the class cuts all texts rightly.
CONFORMING = {
    "FalconTokenizer": ("gpt-2", False),
    "GPT2Tokenizer": ("gpt-2", False),
    "GPTNeoXTokenizer": ("mpt", False),  # MPT's is GPT-NeoX's
    "Llama3Tokenizer": ("llama-bpe", False),
    "LlamaTokenizer": ("llama-spm", True),
    "Phi3Tokenizer": ("phi-3", True),
    "Qwen3_5Tokenizer": ("qwen35", False),
    "QwenTokenizer": ("qwen2", False),
}


@pytest.mark.real
@pytest.mark.parametrize("kind", CONFORMING)
def test_conforms_to_llama_cpp(llama_cpp_models: Path, kind: str, tmp_path: Path) -> None:
    """KerasHub does not cut byte-pair text into words: its expression is a plain string."""
    name, conforms = CONFORMING[kind]
    path = llama_cpp_models / f"ggml-vocab-{name}.gguf"
    data = open_gguf(path).metadata
    tokens = data["tokenizer.ggml.tokens"]
    if conforms:  # sentencepiece
        types = data["tokenizer.ggml.token_type"]
        scores = data["tokenizer.ggml.scores"]
        proto = make_sentencepiece_proto(list(zip(tokens, types, strict=True)), scores, True)
        theirs = getattr(keras_hub.tokenizers, kind)(proto)
    else:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        options = {"has_vision_tokens": False} if kind == "Qwen3_5Tokenizer" else {}
        merges = data["tokenizer.ggml.merges"]
        theirs = getattr(keras_hub.tokenizers, kind)(vocabulary, merges, **options)
    theirs.save_to_preset(tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path)
    lines = path.with_suffix(".gguf.out").read_text().rstrip("\n").split("\n")
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wrong = []
    for text, line in zip(texts, lines, strict=False):
        ids = [int(number) for number in line.split()]
        assert ours.encode(text) == ids, repr(text)
        if ids_of(theirs, text) != ids:
            wrong.append(text)
    assert (not wrong) == conforms, wrong
    if not conforms:
        assert '"Split","pattern":{"String":' in theirs._tokenizer.to_str()
