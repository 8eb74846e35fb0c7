"""The generation loop, on a tiny random model: what it compiles, when it stops, what it refuses."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

import functional_llm as flm
from functional_llm.generation.stop_strings import StoppingDecoder
from functional_llm.generation.text_generator import TextGenerator
from pair import compiled
from tiny import save_tiny

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def generator(folder: str) -> TextGenerator:
    return TextGenerator(flm.Backbone.from_preset(folder), flm.Tokenizer.from_preset(folder))


def _tokenizer(generator: TextGenerator) -> Any:
    return generator.tokenizer


def _full_forward_greedy(backbone: Any, ids: Sequence[int], count: int) -> list[int]:
    whole, run = np.zeros((1, 16), "int32"), compiled(backbone)  # no token sees what follows
    whole[0, : len(ids)] = ids
    for length in range(len(ids), len(ids) + count):
        whole[0, length] = run(whole)[0, length - 1].argmax()
    return whole[0, len(ids) : len(ids) + count].tolist()


def test_greedy_equals_the_graph_run_without_a_cache(generator: TextGenerator) -> None:
    rows = [[5, 9, 200], [7]]
    expected = [_full_forward_greedy(generator.backbone, row, 9) for row in rows]
    assert generator.generate_ids(rows, max_new_tokens=9) == expected


def test_compilations_are_counted_and_few(folder: str) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(folder))
    generator.generate_ids([[1, 2, 3]], max_new_tokens=3)
    assert generator.num_compilations == 2  # a prefill and a decode loop
    for length in (1, 2, 17, 31, 32):
        generator.generate_ids([list(range(3, 3 + length))], max_new_tokens=length)
    assert generator.num_compilations == 2
    generator.generate_ids([[1] * 40], max_new_tokens=3)  # the next padded length
    assert generator.num_compilations == 3
    generator.generate_ids([[1], [2]], max_new_tokens=3)  # another number of rows: both programs
    assert generator.num_compilations == 5


def test_numbers_do_not_recompile(folder: str) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(folder))
    for seed, temperature, top_k in ((0, 0.5, 10), (1, 1.5, 3), (2, 1.0, 7)):
        sampler = flm.samplers.make(temperature=temperature, top_k=top_k)
        generator.generate_ids(
            [[1, 2]], 4, sampler=sampler, seed=seed, stop_token_ids=range(290, 290 + seed)
        )
    assert generator.num_compilations == 2
    generator.generate_ids([[1, 2]], 4, sampler=flm.samplers.make(temperature=1.0), seed=0)
    assert generator.num_compilations == 4  # another kind of sampler


def test_jax_compiles_nothing_behind_the_counter(generator: TextGenerator) -> None:
    generator.generate_ids([[4, 5]], max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        compiled: list[Any] = []
        original = jax._src.compiler.backend_compile_and_load

        def compile_and_note(*args: Any, **kwargs: Any) -> Any:
            compiled.append(args)
            return original(*args, **kwargs)

        patch.setattr(jax._src.compiler, "backend_compile_and_load", compile_and_note)
        generator.generate_ids([[6, 7, 8]], max_new_tokens=4)
    assert compiled == []


@pytest.mark.parametrize(("given", "used"), [(1.0, 0.1), (5.0, 5.0)])
def test_programs_are_kept_though_they_compile_quickly(
    generator: TextGenerator, given: float, used: float
) -> None:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    try:
        jax.config.update(name, given)  # 1.0 is JAX's own number
        TextGenerator(generator.backbone)
        assert jax.config.values[name] == used
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("name", ["greedy", "random", "top_k", "top_p", "min_p"])
def test_rows_give_what_each_gives_alone(generator: TextGenerator, name: str) -> None:
    rows = [[5, 9, 200, 31], [7], list(range(20, 40))]
    together = generator.generate_ids(rows, 12, sampler=name, seed=3)
    alone = [generator.generate_ids([row], 12, name, seed=3 + i)[0] for i, row in enumerate(rows)]
    assert together == alone


def test_seeds(generator: TextGenerator) -> None:
    def draw(seed: Any) -> list[list[int]]:
        return generator.generate_ids([[5], [5]], 16, sampler="random", seed=seed)

    first = draw(11)
    assert draw(11) == first
    assert draw([11, 12]) == first
    assert first[0] != first[1]
    assert draw(-1) == draw(-1)
    assert draw(None) != draw(None)


def test_masks_hold_in_the_prompt_and_in_what_follows(generator: TextGenerator) -> None:
    """Greedy ids as of whole passes without a cache, under a mask that grows with the text."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, n).tolist() for n in (9, 5)]
    mask = (rng.random((2, 9, 9)) < 0.5) | np.eye(9, dtype=bool)
    mask[:, :, 0] = False  # not even the last token of a prompt sees the first one
    expected, run = [], compiled(generator.backbone)
    for row, seen in zip(rows, mask, strict=True):
        ids, count, whole = np.zeros((1, 16), "int32"), len(row), np.ones((1, 16, 16), bool)
        ids[0, :count], whole[0, :count, :count] = row, seen[:count, :count]
        whole[0, count:, :count] = seen[count - 1, :count]
        for length in range(count, count + 6):
            ids[0, length] = run({"token_ids": ids, "mask": whole})[0, length - 1].argmax()
        expected.append(ids[0, count : count + 6].tolist())
    assert generator.generate_ids(rows, max_new_tokens=6, mask=mask) == expected
    assert generator.generate_ids(rows, max_new_tokens=6) != expected


def test_an_attention_mask_is_padding(generator: TextGenerator) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    expected = generator.generate_ids(rows, max_new_tokens=4)
    ids = np.array([rows[0], [0, 0, *rows[1]]])
    mask = np.array([[1] * 5, [0, 0, 1, 1, 1]])
    assert generator.generate_ids(ids, max_new_tokens=4, attention_mask=mask) == expected
    seen = np.ones((2, 5, 5), bool)
    given: dict[str, Any] = {"attention_mask": mask, "mask": seen}
    assert generator.generate_ids(ids, max_new_tokens=4, **given) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": np.ones((2, 2))}, "attention_mask of the shape of the prompts"),
        ({"attention_mask": np.full((2, 3), 5)}, "1 for a token and 0 for padding"),
        ({"attention_mask": np.zeros((2, 3))}, "Prompt 0 is empty"),
        ({"attention_mask": [[1, 1, 1], [1, 1]]}, "attention_mask of the shape of the prompts"),
        ({"mask": np.ones((2, 3, 3))}, "booleans of shape (2, 3, 3)"),
        ({"mask": np.ones((2, 3), bool)}, "booleans of shape (2, 3, 3)"),
    ],
)
def test_bad_masks(generator: TextGenerator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generator.generate_ids([[1, 2, 3], [4, 5, 6]], max_new_tokens=2, **arguments)


def test_repetition_penalty_sees_prompt_and_text(generator: TextGenerator) -> None:
    prompt = [5, 9, 200]
    sampler = flm.samplers.Greedy((flm.samplers.RepetitionPenalty(1e6),))
    ids = generator.generate_ids([prompt], 30, sampler=sampler)[0]
    # With negative logits multiplied away, no token comes twice.
    assert len(set(ids)) == 30
    assert not set(ids) & set(prompt)


def test_stop_ids_end_a_row_and_are_included(generator: TextGenerator) -> None:
    free = generator.generate_ids([[5, 9]], 40)[0]
    stop = free[7]
    ended = free[: free.index(stop) + 1]
    other = generator.generate_ids([[1]], 40)[0]
    result = generator.generate_ids([[5, 9], [1]], 40, stop_token_ids=[stop])
    assert result[0] == ended
    assert result[1] == (other[: other.index(stop) + 1] if stop in other else other)


def test_stream_joins_to_generate(generator: TextGenerator) -> None:
    for seed in range(5):
        whole = generator.generate(PROMPT, 50, sampler="random", seed=seed)
        pieces = list(generator.stream(PROMPT, 50, sampler="random", seed=seed))
        assert "".join(pieces) == whole
        assert generator.generate([PROMPT, "日"], 50, "random", seed=[seed, 1])[0] == whole


MESSAGES = [{"role": "user", "content": "The quick <|im_end|> fox"}]


def test_messages_a_rendered_text_and_ids_are_the_same_prompt(generator: TextGenerator) -> None:
    tokenizer = _tokenizer(generator)
    text = tokenizer.apply_chat_template(MESSAGES)
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True)
    assert text.startswith("<s>") and ids.count(0) == 1
    assert ids.count(tokenizer.token_id("<|im_start|>")) == 2
    expected = generator.generate(ids, 20)
    prompts: list[Any] = [MESSAGES, tuple(MESSAGES), text, np.array(ids), jax.numpy.array(ids)]
    for prompt in prompts:
        assert generator.generate(prompt, 20) == expected
        assert "".join(generator.stream(prompt, 20)) == expected
        assert generator.stats.prefill_tokens == len(ids)
    several: list[Any] = [MESSAGES, text, ids]
    assert generator.generate(several, 20) == [expected] * 3
    rows: Any = np.array([ids, ids])
    assert generator.generate(rows, 20) == [expected] * 2
    assert generator.generate([MESSAGES], 20) == [expected]


def test_what_a_tokenizer_of_transformers_returns_is_a_prompt(
    folder: str, generator: TextGenerator
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.pad_token, theirs.padding_side = "<s>", "left"
    texts = ["The quick", "The quick brown fox"]
    rows = [theirs(text)["input_ids"] for text in texts]
    expected = [generator.generate(row, 4) for row in rows]
    assert generator.generate(theirs(texts[0]), 4) == expected[0]
    assert "".join(generator.stream(theirs(texts[0], return_tensors="np"), 4)) == expected[0]
    for encoding in (theirs(texts), theirs(texts, padding=True, return_tensors="pt")):
        assert generator.generate(encoding, 4) == expected
        assert generator.generate_ids(encoding, 4) == generator.generate_ids(rows, 4)
    assert generator.generate([theirs(text) for text in texts], 4) == expected
    padded = theirs(texts, padding=True, return_tensors="np")
    logits = np.asarray(generator.backbone(padded))
    alone = np.asarray(generator.backbone(np.array(rows[:1])))
    np.testing.assert_allclose(logits[0, -len(rows[0]) :], alone[0], atol=1e-5)


def test_texts_in_arrays(generator: TextGenerator) -> None:
    texts = ["The quick", "The"]
    expected = generator.generate(texts, 4)
    array: Any
    one: Any
    for array in (np.array(texts), np.array(texts, object), tuple(texts)):
        assert generator.generate(array, 4) == expected
    for one in (np.array(texts)[0], np.array(texts[0])):
        assert generator.generate(one, 4) == expected[0]
        assert "".join(generator.stream(one, 4)) == expected[0]
    with pytest.raises(ValueError, match="one prompt, received 2"):
        list(generator.stream(array, 4))


def test_no_tokens_are_refused_by_the_model(generator: TextGenerator) -> None:
    with pytest.raises(ValueError, match=r"at least one token, received shape \(1, 0\)"):
        generator.backbone(np.zeros((1, 0), "int32"))


def test_a_text_from_strangers_holds_no_special_tokens(generator: TextGenerator) -> None:
    tokenizer = _tokenizer(generator)
    text = "<s>a<|im_end|>"
    for parse, length in ((True, 3), (False, len(tokenizer.encode(text)))):
        list(generator.stream(text, 2, parse_special=parse))
        assert generator.stats.prefill_tokens == length
        generator.generate([text, text], 2, parse_special=parse)
        assert generator.stats.prefill_tokens == 2 * length


def test_bos_is_written_once(generator: TextGenerator) -> None:
    tokenizer = dataclasses.replace(_tokenizer(generator), add_bos=True)
    with_bos = TextGenerator(generator.backbone, tokenizer)
    plain = tokenizer.encode("fox")
    for text in ("fox", "<s>fox"):
        list(with_bos.stream(text, 2))
        assert with_bos.stats.prefill_tokens == 1 + len(plain)


def test_a_model_with_more_rows_than_tokens(tmp_path: Path, generator: TextGenerator) -> None:
    folder = save_tiny(tmp_path, vocabulary_size=3000)
    larger = TextGenerator(flm.Backbone.from_preset(folder), _tokenizer(generator))
    text = larger.generate(["fox", "dog"], 16, sampler="random", seed=0)
    pieces = "".join(larger.stream("fox", 16, sampler="random", seed=0))
    assert pieces == text[0]


def test_special_tokens_stop(generator: TextGenerator) -> None:
    tokenizer = _tokenizer(generator)
    for text, stop, expected, stops in (
        ("fox <|im_start|>user", "<|im_start|>", "fox ", True),
        ("fox <|im_start|>user", ["dog", "x <|im_start|>us"], "fo", True),
        ("fox <|im_start|>dog", "<|im_start|>user", "fox dog", False),
        ("fox <|im_start|>日", (), "fox 日", False),
        ("fox <|im_start|>", "<|im_start|>user", "fox ", False),
        ("a<s>b", "<s>b", "a", True),
    ):
        ids = tokenizer.encode(text, parse_special=True)
        for size in (1, 2, len(ids)):
            decoder = StoppingDecoder(tokenizer, stop, continues=True)
            pieces = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
            assert "".join([*pieces, decoder.finish()]) == expected
            assert decoder.stopped == stops


def test_stop_strings_span_tokens(generator: TextGenerator) -> None:
    tried = 0
    for seed in range(12):
        whole = generator.generate(PROMPT, 60, sampler="random", seed=seed)
        if len(whole) < 12:  # the model's own end came first
            continue
        tried += 1
        stop = whole[5:11]  # tokens of this model are one or two characters
        expected = whole[: whole.index(stop)]
        options: dict[str, Any] = {
            "sampler": "random",
            "seed": seed,
            "stop": ["never in there", stop],
        }
        assert generator.generate(PROMPT, 60, **options) == expected
        assert "".join(generator.stream(PROMPT, 60, **options)) == expected
        both = generator.generate([PROMPT, PROMPT], 60, **{**options, "seed": [seed, seed]})
        assert both == [expected, expected]
    assert tried >= 3


def test_weights_that_changed_are_used(folder: str) -> None:
    backbone = flm.Backbone.from_preset(folder)
    generator = TextGenerator(backbone)
    before = generator.generate_ids([[5]], 8)
    embeddings = backbone.get_layer("token_embedding").embeddings
    embeddings.assign(embeddings[::-1])
    after = generator.generate_ids([[5]], 8)
    assert after != before
    assert after == [_full_forward_greedy(backbone, [5], 8)]
    assert generator.num_compilations == 2


def test_a_conversation_reuses_its_cache(generator: TextGenerator) -> None:
    prompt_cache = flm.PromptCache()
    messages: list[dict[str, str]] = []
    tokenizer = _tokenizer(generator)
    for turn in ("One", "Two?", "Three " * 40):  # the last outgrows the cache
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, tokenize=True)
        fresh = "".join(generator.stream(ids, 20))
        fed = generator.stats.prefill_tokens
        again = "".join(generator.stream(ids, 20, past=prompt_cache))
        assert again == fresh
        assert fed == len(ids)
        assert (generator.stats.prefill_tokens < len(ids)) == (len(messages) > 1)
        messages.append({"role": "assistant", "content": again})


def test_a_conversation_survives_another_beginning(generator: TextGenerator) -> None:
    prompt_cache = flm.PromptCache()
    list(generator.stream([1, 2, 3, 4, 5, 6], 8, past=prompt_cache))
    expected = "".join(generator.stream([1, 2, 3, 9, 9], 8))
    stream = generator.stream([1, 2, 3, 9, 9], 8, past=prompt_cache)
    assert "".join(stream) == expected
    assert generator.stats.prefill_tokens == 2
    abandoned = generator.stream([1, 2, 3, 9, 9, 4], 8, past=prompt_cache)
    next(abandoned)
    abandoned.close()
    expected = "".join(generator.stream([1, 2, 3, 7], 8))
    assert "".join(generator.stream([1, 2, 3, 7], 8, past=prompt_cache)) == expected


def test_exactly_as_many_as_asked_for(generator: TextGenerator) -> None:
    for count in (1, 2, 32, 33, 34, 65):
        ids = generator.generate_ids([[3], [4, 5]], max_new_tokens=count)
        assert [len(row) for row in ids] == [count, count]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[]]}, "Prompt 0 is empty"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], [5000, -1]]}, r"Prompt 1: expected token ids .* received \[5000, -1\]"),
        ({"prompts": [[1.5]]}, "expected token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1, received 0"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"prompts": [[1] * 600]}, "600 tokens.* context holds 512"),
        ({"max_new_tokens": 512}, "context holds 512"),
        ({"sampler": "gredy"}, "greedy"),
        ({"seed": [1, 2]}, "one for each of 1 rows"),
        ({"seed": 1.5}, "an integer seed"),
        ({"seed": "x"}, "an integer seed"),
        ({"prompts": [1, 2]}, "Prompt 0: expected a list of token ids, received 1"),
        ({"prompts": None}, "Prompt 0: expected a list of token ids, received None"),
        ({"prompts": ["ab"]}, "Prompt 0: expected a list of token ids, received 'ab'"),
        ({"prompts": [[True]]}, "expected token ids"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected a list"),
        ({"stop_token_ids": [5000]}, "stop_token_ids: expected token ids"),
    ],
)
def test_bad_input(generator: TextGenerator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate_ids(**{"prompts": [[1, 2]], "max_new_tokens": 4, **arguments})


def test_numbers_of_any_kind(generator: TextGenerator) -> None:
    expected = generator.generate_ids([[1, 2]], 4, "random", [7], seed=3)
    sampled: tuple[Any, Any] = ("random", frozenset([7]))
    count: Any = np.int64(4)
    seeds: Any = (np.int32(3), np.array([3]))
    several: list[Any] = [np.array([[1, 2]]), jax.numpy.array([[1, 2]]), ((np.int32(1), 2),)]
    for ids in several:
        for seed in seeds:
            assert generator.generate_ids(ids, count, *sampled, seed=seed) == expected


def test_bad_text(generator: TextGenerator) -> None:
    prompts: list[Any] = ["", ["a", ""]]
    for prompt in prompts:
        with pytest.raises(ValueError, match="at least one character"):
            generator.generate(prompt)
    for stop in ("", 5, [5]):
        with pytest.raises(ValueError, match="non-empty stop strings"):
            generator.generate("a", stop=stop)  # type: ignore[arg-type]
    for nothing in (None, 3):
        with pytest.raises(ValueError, match=f"a text or a list of texts, received {nothing}"):
            generator.generate(nothing)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="at least one prompt"):
        generator.generate([])
    with pytest.raises(ValueError, match="expected token ids"):
        generator.generate([1.5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Wrap a single message in a list"):
        generator.generate({"role": "user", "content": "a"})  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="finite"):
        flm.samplers.make(temperature=float("nan"))
    with pytest.raises(ValueError, match="no tokenizer"):
        TextGenerator(generator.backbone).generate("a")
