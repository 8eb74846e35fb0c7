"""Tokenizers against llama.cpp's conformance files, and on the vocabularies of real models."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_llm.formats.gguf_file import open_gguf
from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from test_tokenizers import CHAT, stream

CONFORMING = (
    "command-r deepseek-coder deepseek-llm falcon gemma-4 gpt-2 llama-bpe llama-spm mpt phi-3 "
    "qwen2 qwen35 refact starcoder"
).split()


@pytest.mark.real
@pytest.mark.parametrize("name", CONFORMING)
def test_conforms_to_llama_cpp(llama_cpp_models: Path, name: str):
    path = llama_cpp_models / f"ggml-vocab-{name}.gguf"
    tokenizer = TextTokenizer.from_gguf_metadata(open_gguf(path).metadata)
    lines = path.with_suffix(".gguf.out").read_text().rstrip("\n").split("\n")
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
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
def test_templates_render_as_in_transformers(llama_cpp_models: Path):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    answered = [*CHAT, {"role": "assistant", "content": "It is ", "reasoning_content": "So?"}]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    options: list[tuple[list[Any], dict[str, Any]]] = [
        (CHAT, {"add_generation_prompt": True}),
        (answered, {"continue_final_message": True}),
        (CHAT, {"tools": [schema], "add_generation_prompt": False}),
    ]
    compared = 0
    for path in sorted((llama_cpp_models / "templates").glob("*.jinja")):
        source = path.read_text("utf-8")
        template = ChatTemplate(source)
        for messages, more in options:
            variables = {"bos_token": "<s>", "eos_token": "</s>", **more}
            try:
                (theirs,), _ = utilities.render_jinja_template(
                    [messages], chat_template=source, **variables
                )
            except Exception:
                # What Transformers cannot render is no reference.
                continue
            assert template.render_marked(messages, **variables).text == theirs, path.name
            compared += 1
    assert compared >= 180


@pytest.mark.real
def test_smollm2_cuts_numbers_into_digits(smollm2_gguf: Path):
    tokenizer = TextTokenizer.from_gguf_metadata(open_gguf(smollm2_gguf).metadata)
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
def stories(material: Path):
    path = material / "stories260K"
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
