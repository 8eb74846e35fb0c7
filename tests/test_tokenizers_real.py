"""Tokenizers against llama.cpp's conformance files, and on the vocabularies of real models."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_llm.convert.gguf import open_gguf
from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from test_tokenizers import CHAT, stream

CACHE = Path(os.environ.get("FUNCTIONAL_LLM_CACHE", "~/.cache/functional_llm")).expanduser()
LLAMA_CPP = Path(os.environ.get("FLM_LLAMA_CPP_MODELS", CACHE / "llama.cpp-models"))
MATERIAL = Path(os.environ.get("FLM_MATERIAL", Path(__file__).parents[2] / "shared" / "material"))
CONFORMING = (
    "command-r deepseek-coder deepseek-llm falcon gemma-4 gpt-2 llama-bpe llama-spm mpt phi-3 "
    "qwen2 qwen35 refact starcoder"
).split()


def llama_cpp_file(name):
    path = LLAMA_CPP / name
    if not path.exists():
        pytest.skip(f"set FLM_LLAMA_CPP_MODELS to llama.cpp's folder models/ (no {path})")
    return path


@pytest.mark.real
@pytest.mark.parametrize("name", CONFORMING)
def test_conforms_to_llama_cpp(name):
    path = llama_cpp_file(f"ggml-vocab-{name}.gguf")
    tokenizer = TextTokenizer.from_gguf_metadata(open_gguf(path).metadata)
    texts = path.with_suffix(".gguf.inp").read_bytes().decode()
    lines = path.with_suffix(".gguf.out").read_text().rstrip("\n").split("\n")
    texts = texts.split("\n__ggml_vocab_test__\n")
    assert len(texts) >= 40
    if len(lines) < len(texts):
        # The last text is empty where the file ends with a separator.
        lines.append("")
    for text, line in zip(texts, lines, strict=True):
        ids = [int(number) for number in line.split()]
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == text


@pytest.mark.real
def test_templates_render_as_in_transformers():
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    llama_cpp_file("templates")
    compared = 0
    for path in sorted((LLAMA_CPP / "templates").glob("*.jinja")):
        source = path.read_text("utf-8")
        variables = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        try:
            (theirs,), _ = utilities.render_jinja_template(
                [CHAT], chat_template=source, **variables
            )
        except Exception:
            # What Transformers cannot render with plain messages is no reference.
            continue
        assert ChatTemplate(source).render(CHAT, **variables) == theirs, path.name
        compared += 1
    assert compared >= 60


@pytest.mark.real
def test_smollm2_cuts_numbers_into_digits():
    path = Path(os.environ.get("FLM_SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("set FLM_SMOLLM2_GGUF")
    tokenizer = TextTokenizer.from_gguf_metadata(open_gguf(path).metadata)
    for number in ("0", "2024", " 31415926535", "1,234.5678"):
        ids = tokenizer.encode(number)
        assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]) != " "] == list(
            number.strip()
        )
    assert tokenizer.eos_token_id == tokenizer.token_id("<|im_end|>")
    assert not tokenizer.add_bos
    ids = tokenizer.apply_chat_template(CHAT[:1], tokenize=True)
    assert ids[0] == tokenizer.token_id("<|im_start|>")
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


@pytest.fixture(scope="session")
def stories():
    path = MATERIAL / "stories260K"
    if not path.is_dir():
        pytest.skip(f"set FLM_MATERIAL (no {path})")
    gguf = open_gguf(path / "stories260K-f32.gguf")
    return TextTokenizer.from_directory(path), TextTokenizer.from_gguf_metadata(gguf.metadata), path


def test_stories260k_in_both_formats(stories):
    golden = json.loads((stories[2] / "golden_greedy.json").read_text())
    for tokenizer in stories[:2]:
        assert tokenizer.vocabulary_size == 512
        assert tokenizer.decode(golden["ids"]) == golden["text"]
        assert (
            tokenizer.encode(golden["text"], add_bos=tokenizer.add_bos)[:60] == golden["ids"][:60]
        )
        assert "".join(stream(tokenizer, golden["ids"])) == golden["text"]


@settings(deadline=None, max_examples=200)
@given(words=st.lists(st.text("abc Lily'd.,!09\n你é😀", min_size=1).map(str.strip), max_size=8))
def test_stories260k_formats_agree(stories, words):
    # Its .model, as the library applies it, drops repeated spaces; llama.cpp keeps them.
    text = " ".join(" ".join(words).split(" ")).strip()
    while "  " in text:
        text = text.replace("  ", " ")
    assert stories[0].encode(text) == stories[1].encode(text)
