"""Tokenizers against their own libraries and Transformers, and on malformed files."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from functional_llm.tokenizers.pretokenizers import PRE_TOKENIZERS
from functional_llm.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
)

CORPUS = [
    "Once upon a time, there was a little girl named Lily. She didn't know what to do.",
    "The quick brown fox jumps over the lazy dog; 12345 times!  Twice\n\n\tas fast.",
    "Привет, мир! 你好，世界。 Ça va? naïve café 😀 ❤️",
]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And <|im_end|> 😀?"},
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("ab Lil'tde.,!0123\n\t 你好é😀▁", max_size=40),
)


def stream(tokenizer, ids, **options):
    decoder = tokenizer.stream_decoder(**options)
    return [decoder.push([token_id]) for token_id in ids] + [decoder.finish()]


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("é~", normalized=False)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return path


@pytest.fixture(scope="session")
def spm_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.fixture(scope="session")
def bpe(bpe_directory):
    return TextTokenizer.from_directory(bpe_directory)


@pytest.fixture(scope="session")
def spm(spm_directory):
    return TextTokenizer.from_directory(spm_directory)


@pytest.fixture(scope="session")
def bpe_metadata(bpe_directory):
    model = json.loads((bpe_directory / "tokenizer.json").read_text())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "é~"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 4) + [USER_DEFINED],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }


@pytest.fixture(scope="session")
def spm_metadata(spm_directory):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_directory / "tokenizer.model"))
    ids = range(model.vocab_size())
    kinds = [
        BYTE if model.is_byte(i) else UNKNOWN if i == 0 else CONTROL if model.is_control(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
    }


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_byte_pairs_equal_the_library_in_both_formats(bpe_directory, bpe, bpe_metadata, text):
    library = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    library.no_truncation()
    library.encode_special_tokens = True
    ids = bpe.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ids == TextTokenizer.from_gguf_metadata(bpe_metadata).encode(text)
    assert bpe.decode(ids) == "".join(stream(bpe, ids)) == text


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_sentencepiece_equals_the_library_in_both_formats(spm_directory, spm, spm_metadata, text):
    library = spm.engine.processor
    ids = spm.encode(text)
    assert ids == library.encode(text)
    assert ids == TextTokenizer.from_gguf_metadata(spm_metadata).encode(text)
    assert spm.decode(ids) == "".join(stream(spm, ids)) == text.replace("▁", " ")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_stream_of_any_ids_joins_to_their_text(bpe, spm, data):
    tokenizer = data.draw(st.sampled_from([bpe, spm]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=30))
    for options in ({}, {"skip_special_tokens": False}, {"continues": True}):
        assert "".join(stream(tokenizer, ids, **options)) == tokenizer.decode(ids, **options)


def test_stream_never_emits_half_a_character(bpe, spm):
    for tokenizer in (bpe, spm):
        text = "a😀你好𐍈 é"
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert not any("�" in piece for piece in pieces)
        emoji = tokenizer.encode("𐍈")
        assert stream(tokenizer, emoji[:-1])[-1] == "�"


def test_first_space_belongs_to_the_text_only_when_it_continues(spm):
    ids = spm.encode("Lily")
    assert spm.decode(ids) == "Lily"
    assert spm.decode(ids, continues=True) == " Lily"
    assert spm.decode([spm.bos_token_id, *ids]) == "Lily"
    assert spm.decode([spm.bos_token_id, *ids], skip_special_tokens=False) == "<s> Lily"


def test_special_tokens_are_read_only_when_asked_for(bpe, spm):
    for tokenizer in (bpe, spm):
        end = tokenizer.token_id("<|im_end|>")
        text = "Hello<|im_end|>you"
        assert end not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.encode(text, parse_special=True)
        assert ids.count(end) == 1
        assert ids[ids.index(end) + 1 :] == tokenizer.encode("you")
    assert bpe.encode("aé~b") == [*bpe.encode("a"), bpe.token_id("é~"), *bpe.encode("b")]
    assert bpe.decode(bpe.encode("aé~b")) == "aé~b"


def test_facts_of_a_directory(bpe, spm):
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id, bpe.add_bos) == (
        None,
        2,
        0,
        False,
    )
    assert bpe.stop_token_ids == {0, 2, 7}
    assert (spm.bos_token_id, spm.eos_token_id, spm.pad_token_id, spm.add_bos) == (1, 2, 400, True)
    assert spm.stop_token_ids == {2, spm.token_id("<|im_end|>")}
    assert spm.vocabulary_size == 401
    assert spm.encode("a", add_bos=True) == [1, *spm.encode("a")]
    assert spm.token_id("no such token") is None


def test_facts_of_a_gguf(bpe_metadata, spm_metadata):
    bpe = TextTokenizer.from_gguf_metadata(bpe_metadata)
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.add_bos) == (None, 0, False)
    assert bpe.stop_token_ids == {0, 2}
    spm = TextTokenizer.from_gguf_metadata(spm_metadata)
    assert (spm.bos_token_id, spm.eos_token_id, spm.add_bos) == (1, 2, True)
    without_space = TextTokenizer.from_gguf_metadata(
        spm_metadata | {"tokenizer.ggml.add_space_prefix": False}
    )
    assert without_space.decode(without_space.encode(" Lily")) == " Lily"
    assert without_space.encode(" Lily") == spm.encode("Lily")


def test_decoders_of_a_tokenizer_json(tmp_path):
    tokens = ["▁Hello", "▁you", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [])
    )
    decoders = tokenizers.decoders
    for decoder in (
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]),
    ):
        tokenizer.decoder = decoder
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        ours = TextTokenizer.from_directory(tmp_path)
        ids = [0, 1, 2, 3, 4, 5, 6]
        assert ours.decode(ids) == "".join(stream(ours, ids)) == tokenizer.decode(ids)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="unknown decoder.*WordPiece"):
        TextTokenizer.from_directory(tmp_path)


def test_equals_transformers_on_the_same_directory(bpe_directory, bpe):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(bpe_directory)
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices("ab Lily'd.,!09\n 你好é😀<|im_end|>", k=30)) + "<|im_end|>x"
        ids = bpe.encode(text, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert bpe.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for add in (False, True):
        rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add)
        assert bpe.apply_chat_template(CHAT, add_generation_prompt=add) == rendered
    ids = bpe.apply_chat_template(CHAT, tokenize=True)
    assert ids == theirs.encode(rendered, add_special_tokens=False)


def test_chat_begins_with_exactly_one_bos(spm_directory, spm):
    ids = spm.apply_chat_template(CHAT, tokenize=True)
    assert ids[0] == 1 and ids.count(1) == 1
    (spm_directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    without = TextTokenizer.from_directory(spm_directory)
    (spm_directory / "chat_template.jinja").write_text(CHATML)
    assert without.apply_chat_template(CHAT, tokenize=True) == without.encode(
        CHAT[0]["content"], add_bos=True
    )


def test_template_language():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1) }}{{ strftime_now('%Y')|length }}{{ tools }}"
    )
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": "<é>"}]
    text = ChatTemplate(source).render(messages)
    assert text == '"<é>"{\n "b": "<é>",\n "a": [\n  1\n ]\n}4None'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_raises(source):
    with pytest.raises(ValueError, match="did not accept the conversation"):
        ChatTemplate(source).render(CHAT)


@pytest.mark.parametrize(
    "messages",
    ["Hello", [], None, {"role": "user", "content": "a"}, ["Hello"], [{"role": "user"}], [[CHAT]]],
)
def test_messages_of_another_shape(bpe, messages):
    with pytest.raises(ValueError, match="Expected: a non-empty list of messages"):
        bpe.apply_chat_template(messages)


def test_malformed_and_missing_templates(bpe_directory, bpe_metadata, spm_metadata):
    broken = bpe_metadata | {"tokenizer.chat_template": "{% for m in messages %}"}
    with pytest.raises(ValueError, match="not a valid Jinja template"):
        TextTokenizer.from_gguf_metadata(broken).apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="has no chat template"):
        TextTokenizer.from_gguf_metadata(spm_metadata).apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="plain data"):
        TextTokenizer.from_directory(bpe_directory).apply_chat_template(CHAT, tools=[print])


def test_malformed_directories(tmp_path, bpe_directory):
    with pytest.raises(ValueError, match="no tokenizer in .*tokenizer.json or tokenizer.model"):
        TextTokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        TextTokenizer.from_directory(tmp_path / "nothing")
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="tokenizer.model is malformed"):
        TextTokenizer.from_directory(tmp_path)
    whole = (bpe_directory / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="tokenizer.json is malformed"):
        TextTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 5}')
    with pytest.raises(ValueError, match="contradicts the files beside it"):
        TextTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    message = "tokenizer_config.json: expected a JSON object, received list. Fetch the file again"
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos')
    message = "tokenizer_config.json is no valid JSON: .*line 1 column 2.*Fetch the file again"
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("tokenizer_config", {"eos_token": 5}),
        ("tokenizer_config", {"bos_token": {"content": ["<s>"]}}),
        ("tokenizer_config", {"chat_template": {"default": "x"}}),
        ("tokenizer_config", {"chat_template": [{"name": "default"}, "x"]}),
        ("tokenizer_config", {"added_tokens_decoder": [1]}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "x"}}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"content": "x", "lstrip": "no"}}}),
        ("tokenizer_config", {"additional_special_tokens": "<x>"}),
        ("tokenizer_config", {"extra_special_tokens": [5]}),
        ("tokenizer_config", {"extra_special_tokens": {"image_token": 5}}),
        ("tokenizer_config", {"add_bos_token": "yes"}),
        ("special_tokens_map", {"pad_token": [1]}),
        ("added_tokens", {"x": "1"}),
        ("generation_config", {"eos_token_id": ["2"]}),
        ("config", {"eos_token_id": {"a": 1}}),
    ],
)
def test_malformed_facts(tmp_path, bpe_directory, name, facts):
    (tmp_path / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="A file of the tokenizer is malformed. Expected: "):
        TextTokenizer.from_directory(tmp_path)


def test_an_end_token_of_minus_one_is_none(tmp_path, bpe_directory):
    (tmp_path / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": -1, "pad_token_id": -1}')
    tokenizer = TextTokenizer.from_directory(tmp_path)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    assert -1 not in tokenizer.stop_token_ids


def test_malformed_metadata(bpe_metadata, spm_metadata):
    for change, message in (
        ({"tokenizer.ggml.model": "bert"}, "unknown kind of tokenizer.*gpt2"),
        ({"tokenizer.ggml.pre": "nothing"}, "unknown pre-tokenizer.*smollm.*'nothing'"),
        ({"tokenizer.ggml.token_type": [1]}, "vocabulary is malformed"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "vocabulary is malformed"),
        ({"tokenizer.ggml.tokens": 5}, "a list under tokenizer.ggml.tokens. Received: 5"),
        ({"tokenizer.ggml.pre": ["x"]}, "a str under tokenizer.ggml.pre"),
        ({"tokenizer.chat_template": 5}, "a str under tokenizer.chat_template"),
        ({"tokenizer.ggml.merges": ["no such"]}, "vocabulary is malformed"),
        ({"tokenizer.ggml.merges": ["nothing"]}, "vocabulary is malformed"),
    ):
        with pytest.raises(ValueError, match=message):
            TextTokenizer.from_gguf_metadata(bpe_metadata | change)
    for key in ("model", "tokens", "merges"):
        fewer = {k: v for k, v in bpe_metadata.items() if k != f"tokenizer.ggml.{key}"}
        with pytest.raises(ValueError, match=f"Expected: the key tokenizer.ggml.{key}"):
            TextTokenizer.from_gguf_metadata(fewer)
    with pytest.raises(ValueError, match="vocabulary is malformed"):
        TextTokenizer.from_gguf_metadata(spm_metadata | {"tokenizer.ggml.scores": [0.5]})
    fewer = {k: v for k, v in bpe_metadata.items() if k != "tokenizer.ggml.pre"}
    with pytest.warns(UserWarning, match="has no tokenizer.ggml.pre"):
        TextTokenizer.from_gguf_metadata(fewer)


def test_bad_arguments(bpe, spm):
    for text in (b"bytes", None, ["a"], "\ud800"):
        with pytest.raises(ValueError, match="`text` cannot be encoded"):
            bpe.encode(text)
    for tokenizer in (bpe, spm):
        for token_id in (-1,):
            with pytest.raises(ValueError, match=f"out of range.*Received: {token_id}"):
                tokenizer.decode([token_id])
    with pytest.raises(ValueError, match="no BOS token"):
        bpe.encode("a", add_bos=True)


@pytest.mark.parametrize("name", [n for n, pre in PRE_TOKENIZERS.items() if pre.byte_level])
def test_every_pre_tokenizer_keeps_the_text(bpe_metadata, name):
    tokenizer = TextTokenizer.from_gguf_metadata(bpe_metadata | {"tokenizer.ggml.pre": name})
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
