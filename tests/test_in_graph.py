"""Tokenizers as TensorFlow operations give the ids of ours; SavedModels write what ours write."""

import json
import pickle
import random
import re
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

import functional_llm as flm
from functional_llm.formats.gguf_file import open_gguf
from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.in_graph.patterns import compile_cut
from functional_llm.tokenizers.pretokenizers import PRE_TOKENIZERS
from nightly import is_night
from stock import run_stock
from test_tokenizer_files import (
    LLAMA,
    NUM_PIECES,
    PLAIN,
    _byte_pairs,
    _token,
    _write,
    sentencepiece_model,
)
from tiny import save_tiny

TESTS = Path(__file__).resolve().parent
PARTS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<ud>", "<brand>", "<x>", "<pad>", "<b>"]
PARTS += [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x85", "\xa0", "\u2009", "\u3000", "\u200d"]
PARTS += ["a", "Lily", "Once", " upon", "'s", "'S", "'ſ", "'LL", "1", "12345", "٣", "Ⅷ", "½", "▁"]
PARTS += [
    "é",
    "e\u0301",
    "你好",
    "カタカナ",
    "😀",
    "ﬁ",
    "\ufeff",
    "\ufdd0",
    "६",
    "\0",
    "\x7f",
    "!!",
    "$x",
]
# Marks of several versions of Unicode, which normal form C orders and composes.
MARKS = "Az\u0300\u0301\u0323\u0345\u0307\u0897\u1acf\u0344\u212b\u1100\u1161\u11a8\uac00\u0958"
MARKS += "\U000105d2\U000105c9\U000113c2\U000113b8\U00016d67\U0001611e\U00011935\U00011930"


def make_texts(count: int = 150) -> list[str]:
    rng = random.Random(count)
    texts = ["", *("".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count))]
    texts += ["".join(rng.choices(MARKS, k=8)) for _ in range(count)]
    kinds = [(1, 128), (1, 0x3000), (0xE000, 0x110000)]
    points = ([rng.randrange(*rng.choice(kinds)) for _ in range(20)] for _ in range(count // 3))
    return texts + ["".join(map(chr, row)) for row in points]


def run_jobs(folder: Path, jobs: dict[str, Any]) -> dict[str, Any]:
    """Returns the answers of in_graph_check.py."""
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    packages = sysconfig.get_path("purelib")
    arguments = [str(TESTS.parent), packages, str(folder / "jobs"), str(folder / "answers")]
    run_stock("jax", str(TESTS / "in_graph_check.py"), *arguments)
    return json.loads((folder / "answers").read_text())


def byte_pairs(folder: Path, change: Callable[[tokenizers.Tokenizer], None], **facts: Any) -> Any:
    tokenizer = _byte_pairs()
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return _write(folder, {"tokenizer_config.json": PLAIN | facts})


def sentencepiece(folder: Path, files: dict[str, Any], **options: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    return _write(folder, files)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    def change(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return change


def compose(tokenizer: tokenizers.Tokenizer) -> None:
    """As Qwen's."""
    split(PRE_TOKENIZERS["qwen2"].patterns[0])(tokenizer)
    tokenizer.normalizer = normalizers.NFC()


def cut_digits(tokenizer: tokenizers.Tokenizer) -> None:
    """As SmolLM's."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def cut_punctuation(tokenizer: tokenizers.Tokenizer) -> None:
    """As Falcon's."""
    words = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)


def ignore_merges(tokenizer: tokenizers.Tokenizer) -> None:
    """As Llama 3's."""
    split(PRE_TOKENIZERS["llama3"].patterns[0], "removed", True)(tokenizer)
    tokenizer.model.ignore_merges = True


def nothing(tokenizer: tokenizers.Tokenizer) -> None:
    pass


TRACED = {"qwen", "llama", "sentencepiece, stripped"}  # all steps that there are
ENDS = {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}
UNIGRAM = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
UNIGRAM |= {"hard_vocab_limit": False}
STRIPS = {
    str(NUM_PIECES): _token("<brand>", lstrip=True),
    str(NUM_PIECES + 1): _token("<x>", rstrip=True, normalized=True),
    str(NUM_PIECES + 2): _token("<b>", lstrip=True, rstrip=True, special=True),
}
# What a folder is made of.
TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "gpt-2": lambda x: byte_pairs(x, nothing),
    "gpt-2 with a space": lambda x: byte_pairs(
        x, nothing, tokenizer_class="GPT2Tokenizer", add_prefix_space=True
    ),
    "qwen": lambda x: byte_pairs(x, compose, added_tokens_decoder=STRIPS),
    "smollm": lambda x: byte_pairs(x, cut_digits, additional_special_tokens=["<|im_end|>!", "<x>"]),
    "falcon": lambda x: byte_pairs(x, cut_punctuation),
    "llama 3": lambda x: byte_pairs(x, ignore_merges, added_tokens_decoder=STRIPS),
    "sentencepiece": lambda x: sentencepiece(
        x, ENDS | {"added_tokens.json": {"<brand>": NUM_PIECES}}, user_defined_symbols="<ud>"
    ),
    "sentencepiece, stripped": lambda x: sentencepiece(
        x, {"tokenizer_config.json": {"bos_token": "<s>", "added_tokens_decoder": STRIPS}}
    ),
    "unigram": lambda x: sentencepiece(x, ENDS, model_type="unigram", **UNIGRAM),
    "llama": lambda x: sentencepiece(x, {"tokenizer_config.json": LLAMA | {"legacy": False}}),
    "llama, legacy": lambda x: sentencepiece(
        x, {"tokenizer_config.json": LLAMA | {"legacy": True}}
    ),
    "llama, no bytes": lambda x: sentencepiece(
        x, {"tokenizer_config.json": LLAMA}, byte_fallback=False, vocab_size=120
    ),
}
WHOLE = {str(NUM_PIECES): _token("<x>", single_word=True)}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a whole word": (
        lambda x: byte_pairs(x, nothing, added_tokens_decoder=WHOLE),
        "the added token '<x>', which is read only where it is a whole word",
    ),
    "a lookahead": (
        lambda x: byte_pairs(x, split(PRE_TOKENIZERS["tiny_aya"].patterns[0])),
        r"'\(\?=' in the expression .* of its pre-tokenizer",
    ),
    "words that are lost": (
        lambda x: byte_pairs(x, split(r"\w+", "removed", True)),
        "splits at .* with Removed, invert=True",
    ),
    "another normalizer": (
        lambda x: byte_pairs(x, lambda y: setattr(y, "normalizer", normalizers.Lowercase())),
        "the normalizer .*Lowercase",
    ),
}


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Name -> the tokenizer, its options, texts and rows of ids, and what TensorFlow says."""
    folder, rng = tmp_path_factory.mktemp("in_graph"), random.Random(0)
    texts = make_texts(150 if is_night(request.config) else 50)
    asked = {}
    for name, make in [*TOKENIZERS.items(), *((k, make) for k, (make, _) in REFUSED.items())]:
        (folder / name).mkdir()
        ours = TextTokenizer.from_directory(make(folder / name))
        for parse in (False, True):
            rows = [
                [rng.randrange(ours.vocabulary_size + 2) for _ in range(rng.randrange(9))]
                for _ in range(100)
            ]
            options = {"parse_special": parse, "add_bos": parse and ours.bos_token_id is not None}
            asked[f"{name} {parse}"] = [ours, texts, rows, options, parse and name in TRACED]
    jobs: dict[str, Any] = {name: ("ask", x) for name, x in asked.items()}
    asked["in use"] = [asked["smollm True"][0], texts[:20], str(folder / "saved")]
    answers = run_jobs(folder, jobs | {"in use": ("use", asked["in use"])})
    return {name: (*x, answers[name]) for name, x in asked.items()}


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_texts_are_ours(asked: dict[str, Any], name: str, parse: bool) -> None:
    ours, texts, rows, options, _, answer = asked[f"{name} {parse}"]
    assert answer.get("dtype") == "int32", answer
    for text, ids in zip(texts, answer["ids"], strict=True):
        assert ours.encode(text, **options) == ids, repr(text)
    for key, skip, continues in (("TrueFalse", True, False), ("FalseTrue", False, True)):
        for row, text in zip(rows, answer["decoded"][key], strict=True):
            assert ours.decode(row, skip, continues) == text, row


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_result_is_refused(asked: dict[str, Any], name: str) -> None:
    for parse in (False, True):
        message = asked[f"{name} {parse}"][-1]["refused"]
        assert re.search(
            f"cannot be in a TensorFlow graph.*Received: .*{REFUSED[name][1]}", message
        )


def test_in_a_pipeline_and_a_saved_model(asked: dict[str, Any]) -> None:
    ours, texts, _, found = asked["in use"]
    expected = [ours.encode(text) for text in texts]
    assert found["one by one"] == found["batches"] == found["saved"] == expected
    assert found["empty"] == [[], [], [[], []]]
    assert "Invalid" in found["broken"] or "invalid" in found["broken"]
    assert found["negative"]


REAL = ["llama-bpe", "llama-spm", "deepseek-llm"]


@pytest.mark.nightly
@pytest.mark.real
def test_conforms_with_real_vocabularies(llama_cpp_models: Path, tmp_path: Path) -> None:
    jobs, expected = {}, {}
    for name in REAL:
        path = llama_cpp_models / f"ggml-vocab-{name}.gguf"
        ours = TextTokenizer.from_gguf_metadata(open_gguf(path).metadata)
        texts = path.with_suffix(".gguf.inp").read_bytes().decode()
        given = [*texts.split("\n__ggml_vocab_test__\n"), *make_texts()]
        jobs[name] = ("ask", [ours, given, [[0]], {}, True])
        expected[name] = [ours.encode(text) for text in given]
    answers = run_jobs(tmp_path, jobs)
    for name in REAL:
        assert answers[name]["ids"] == expected[name], name


SERVE = """
import json, sys
import tensorflow as tf, tensorflow_text
for name, prompts in json.loads(sys.argv[1]).items():
    serve = tf.saved_model.load(name).signatures["serving_default"]
    texts = serve(prompts=tf.constant(prompts))["texts"].numpy().tolist()
    print("texts", json.dumps([name, [text.decode() for text in texts]]))
    for wrong in ([""], ["a " * 3000]):
        try:
            serve(prompts=tf.constant(wrong))
        except tf.errors.InvalidArgumentError as error:
            print("error", str(error).partition("Condition")[0].replace("\\n", " "))
assert "functional_llm" not in sys.modules
"""


@pytest.mark.nightly
def test_a_saved_model_writes_what_ours_writes(material: Path, tmp_path: Path) -> None:
    prompts = {
        "trained": ["Once upon a time", "Lily", "The dog 😀</s> said:"],
    }
    models = [("trained", str(material / "stories260K"), prompts["trained"], 24)]
    expected = run_jobs(tmp_path, {"x": ("export", [models, str(tmp_path)])})["x"]
    output = run_stock("jax", "-c", SERVE, json.dumps(prompts), folder=tmp_path)
    texts = dict(json.loads(x) for x in re.findall("^texts (.*)$", output, re.M))
    assert texts == expected
    errors = re.findall("^error (.*)$", output, re.M)
    assert len(errors) == 2
    assert "prompts of at least one character" in errors[0]
    assert "prompts of at most 488 tokens" in errors[1]


def test_the_page_runs(tmp_path: Path) -> None:
    """All blocks of docs/tensorflow.md in turn, with a tiny model in the place of the preset."""
    page = (TESTS.parent / "docs" / "tensorflow.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    code = code.replace("smollm2_135m_instruct", str(save_tiny(tmp_path / "tiny")))
    paths = f"import sys\nsys.path.insert(0, {str(TESTS.parent)!r})\n"
    paths += f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
    code += "\nprint('texts', [x.decode() for x in new_texts.numpy()], ids.to_list())"
    output = run_stock("jax", "-c", paths + code, folder=tmp_path)
    ours = flm.Tokenizer.from_preset(tmp_path / "tiny")
    generator = flm.TextGenerator(flm.Backbone.from_preset(tmp_path / "tiny"), ours)
    texts = generator.generate(["The capital of France is"], 32)
    assert f"texts {texts} {[ours.encode(x) for x in ('Hello, world!', '123')]}" in output


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is here")
def test_without_tensorflow_the_error_says_what_to_install(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tokenizer, message = (
        TextTokenizer.from_directory(tmp_path),
        "pip install tensorflow-text",
    )
    with pytest.raises(ImportError, match=message):
        tokenizer.as_tf()
    backbone = flm.Backbone.from_preset(tmp_path)
    with pytest.raises(ImportError, match=message):
        backbone.export(tmp_path / "saved", "tf_saved_model", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="max_new_tokens of at least 1, received 0"):
        backbone.export(tmp_path / "saved", "tf_saved_model", tokenizer=tokenizer, max_new_tokens=0)
    with pytest.raises(ValueError, match='Expected a tokenizer with format="tf_saved_model"'):
        backbone.export(tmp_path / "saved", tokenizer=tokenizer)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\p{L}*", "matches an empty text"),
        (r"\p{L}++", r"'\+\+' in the expression"),
        (r"\b\w+", r"in the expression"),
        (r"(?<=a)b", r"in the expression"),
        (r"(?!a)b", "a lookahead that follows no character"),
        (r"(?:a|b)(?!c)", "follows more than repeated characters of one set"),
        (r"(?i:'ss|'t)", r"\(\?i:"),
        ("[a", r"'\[a' in the expression"),
    ],
)
def test_expressions_that_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_cut(pattern)
