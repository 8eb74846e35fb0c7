"""Log-probabilities of given continuations, and perplexity: Transformers, and lm-eval's rules.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
import torch
import transformers

import functional_llm as flm
from configs import CONFIGS
from functional_llm.evaluation import batches as batches_module
from functional_llm.evaluation import scorer as scorer_module
from functional_llm.evaluation.batches import make_batches
from functional_llm.evaluation.perplexity import rolling_windows
from functional_llm.evaluation.prefixes import find_runs
from functional_llm.evaluation.rows import Row, encode_pair
from nightly import one_of_a_few
from pair import compiled
from reference import reference_logits, save_reference
from tiny import save_tiny

IdRow = tuple[list[int], list[int]]


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


# Contexts with several continuations, longer than any window, and one with a single continuation.
ROWS: list[IdRow] = [
    *((ids(70, 0), ids(n, n)) for n in (3, 1, 4)),
    *((ids(70, 9)[:33], ids(n, 10 + n)) for n in (4, 2)),
    (ids(5, 1), ids(50, 2)),
]


def expected_scores(model: Any, rows: Sequence[IdRow]) -> list[np.ndarray]:
    """Returns Transformers' log-probabilities (tokens, V) of each row, one row at a time."""
    found = []
    for context, continuation in rows:
        logits = reference_logits(model, np.array([[*context, *continuation[:-1]]]))
        logs = torch.log_softmax(torch.tensor(logits[0]), -1).numpy()
        found.append(logs[len(context) - 1 :])
    return found


def check_scores(scores: Sequence[flm.Score], rows: Sequence[IdRow], expected: Any) -> None:
    for found, (_, continuation), logs in zip(scores, rows, expected, strict=True):
        right = logs[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(found.token_log_probabilities, right, atol=1e-4, rtol=0)
        assert found.log_probability == pytest.approx(right.sum(), abs=1e-4 * len(right))
        assert found.is_greedy == (logs.argmax(-1).tolist() == continuation)
        assert found.token_ids == continuation and found.num_tokens == len(continuation)


@one_of_a_few
def test_what_stands_before_all_contexts_counts(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "_TOKENS_ON_CPU", 64)  # which sharing saves
    rows = [([*ids(41, 0), *ids(n, n)], ids(k, n + k)) for n in (12, 9, 30) for k in (1, 3)]
    rows.append(([*ids(41, 0), *ids(5, 99)], ids(2, 1)))
    works = list(make_batches([Row(*row) for row in rows], 64))
    assert all(work.prefix is not None for work in works)
    check_scores(flm.score(pair.ours, rows), rows, expected_scores(pair.reference, rows))


@one_of_a_few
def test_log_probabilities_are_those_of_transformers(pair: Any) -> None:
    likeliest = expected_scores(pair.reference, [(ROWS[0][0], [0])])[0][0].argmax()
    rows = [*ROWS, (ROWS[0][0], [int(likeliest)])]
    scores = flm.score(pair.ours, rows)
    check_scores(scores, rows, expected_scores(pair.reference, rows))
    assert scores[-1].is_greedy and not scores[0].is_greedy  # of one token and of three
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "_SHORTEST_CONTEXT", 1000)  # every row on its own
        alone = flm.score(pair.ours, rows)
    for found, expected in zip(scores, alone, strict=True):
        logs = expected.token_log_probabilities
        np.testing.assert_allclose(found.token_log_probabilities, logs, atol=1e-5, rtol=1e-6)


def test_a_context_is_not_shared_where_a_text_becomes_long(tmp_path: Path) -> None:
    """LongRoPE: all of a text beyond 24 tokens is turned in another way."""
    config = {**CONFIGS["phi3_long_texts"], "original_max_position_embeddings": 24}
    reference = save_reference(config, tmp_path)
    rows = [(ids(20, 0), ids(n, n)) for n in (2, 3, 4, 9, 10)]
    rows += [(ids(40, 0), ids(n, n)) for n in (2, 3)]
    scores = flm.score(flm.Backbone.from_preset(tmp_path), rows)
    check_scores(scores, rows, expected_scores(reference, rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> flm.Backbone:
    return flm.Backbone.from_preset(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> flm.Tokenizer:
    return flm.Tokenizer.from_preset(folder)


@pytest.fixture(scope="module")
def scorer(backbone: flm.Backbone) -> flm.Scorer:
    return flm.Scorer(backbone)


# Texts --------------------------------------------------------------------------------------------

PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick brown ", "fox"),  # the space goes to the continuation
    ("Answer:\n\n", "Paris"),
    ("  leading", " and\ttabs "),
    ("", "no context"),
    ("a<|im_end|>", "\n<|im_start|>b"),  # special tokens are these tokens
]


def harness_pair(tokenizer: Any, context: str, continuation: str) -> IdRow:
    """What lm-evaluation-harness 0.4.13 does with a tokenizer of Transformers."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if context == "":
        alone = tokenizer.encode(continuation, add_special_tokens=False)
        return ([first], alone) if alone[0] != first else (alone[:1], alone[1:])
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, begin = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return whole[: len(begin)], whole[len(begin) :]


def test_texts_are_encoded_as_in_the_harness(folder: Path, tokenizer: flm.Tokenizer) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for context, continuation in PAIRS:
        expected = Row(*harness_pair(reference, context, continuation))
        assert encode_pair(tokenizer, context, continuation) == expected
    # Where the harness fails: a context of nothing but white space.
    whole = tokenizer.encode("\n x")
    assert encode_pair(tokenizer, "\n ", "x") == ([reference.bos_token_id], whole)


def test_texts_are_encoded_with_the_bos_of_stories260k(material: Path) -> None:
    path = material / "stories260K"
    reference = transformers.AutoTokenizer.from_pretrained(path)
    ours = flm.Tokenizer.from_preset(path)
    pairs = [pair for pair in PAIRS[:5] if pair[0]]  # of an empty one, the space that comes first
    for context, continuation in pairs:
        row = encode_pair(ours, context, continuation)
        assert row == Row(*harness_pair(reference, context, continuation))
        assert row.context[0] == ours.bos_token_id != row.context[1]


def test_stories260k_has_the_numbers_of_transformers(material: Path) -> None:
    path = material / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    start = "Once upon a time, there was a little girl named"
    texts = [(start, " Lily."), (start, " Tim. He"), ("", "The end"), ("Lily and", " Tom went")]
    rows = [harness_pair(tokenizer, *pair) for pair in texts if pair[0]]
    scores = flm.score(flm.Backbone.from_preset(path), [pair for pair in texts if pair[0]])
    check_scores(scores, rows, expected_scores(model, rows))
    assert scores[0].log_probability > scores[1].log_probability


@pytest.mark.real
@pytest.mark.nightly  # by day, tiny models do
def test_smollm2_has_the_numbers_of_transformers(smollm2_gguf: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    scorer = flm.Scorer(flm.Backbone.from_preset(smollm2_gguf))
    question = "Question: What is the capital of France?\nAnswer:"
    texts = [(question, x) for x in (" Paris", " London", " a large cheese")]
    rows = [encode_pair(scorer.tokenizer, *pair) for pair in texts]
    scores = scorer.score(texts)
    check_scores(scores, rows, expected_scores(model, rows))
    assert max(scores, key=lambda score: score.log_probability) is scores[0]


def test_contexts_may_be_messages(scorer: flm.Scorer, tokenizer: flm.Tokenizer) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    text = tokenizer.apply_chat_template(messages)
    found, expected = scorer.score([(messages, "Nobody."), (text, "Nobody.")])
    assert found.token_ids == expected.token_ids
    np.testing.assert_array_equal(found.token_log_probabilities, expected.token_log_probabilities)


# Models -------------------------------------------------------------------------------------------


def test_edited_models_are_scored_as_they_are(backbone: flm.Backbone) -> None:
    lora = flm.peft.lora(backbone, rank=2)
    for variable in lora.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape) * 0.1)

    def halve(layer: Any, path: str) -> Any:
        return keras.layers.Rescaling(0.5, name=layer.name) if path == "final_norm" else layer

    quantized = flm.quantize(backbone, "int8")
    captured = flm.capture(backbone, "decoder_*")
    models = [lora, flm.rewire(backbone, halve), quantized, captured, flm.TextGenerator(lora)]
    base = flm.score(backbone, ROWS[:3])
    tokens_BT = np.zeros((3, 80), "int32")
    for tokens_T, row in zip(tokens_BT, ROWS, strict=False):
        inputs = Row(*row).inputs
        tokens_T[: len(inputs)] = inputs
    for model in models:
        logits = compiled(getattr(model, "backbone", model))(tokens_BT)
        logits = logits["logits"] if isinstance(logits, dict) else logits
        logs_BTV = np.asarray(jax.nn.log_softmax(logits))
        for i, (found, plain) in enumerate(zip(flm.score(model, ROWS[:3]), base, strict=True)):
            context, continuation = ROWS[i]
            right = logs_BTV[i, len(context) - 1 :][np.arange(len(continuation)), continuation]
            # Activations beside int8 are rounded, to other numbers in another order of sums.
            tolerance = 0.05 if model is quantized else 1e-4
            np.testing.assert_allclose(found.token_log_probabilities, right, atol=tolerance)
            moved = np.abs(found.token_log_probabilities - plain.token_log_probabilities).max()
            assert (moved > 1e-4) == (model is not captured)


def test_new_weights_are_used_and_nothing_is_compiled_for_them(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = flm.Backbone.from_preset(folder)
    scorer = flm.Scorer(backbone)
    before = scorer.score(ROWS[:3])[0].log_probability
    table = backbone.get_layer("token_embedding").embeddings
    table.assign(table * 1.5)
    jax.config.update("jax_log_compiles", True)
    try:
        after = scorer.score(ROWS[:3])[0].log_probability
    finally:
        jax.config.update("jax_log_compiles", False)
    assert abs(after - before) > 1e-3
    assert "_score_batch" not in capfd.readouterr().err
    table.assign(table * np.nan)
    with pytest.raises(RuntimeError, match="Expected finite logits"):
        scorer.score(ROWS[:3])


def test_logits_of_all_tokens_are_never_there_at_once(scorer: flm.Scorer) -> None:
    rows = [Row(ids(100, i), ids(20, i)) for i in range(16)]
    (work,) = make_batches(rows, tokens=2048)
    ((_, batch),) = work.batches
    values = [variable.value for variable in scorer.backbone.variables]
    program = str(jax.make_jaxpr(scorer._score_batch)(values, batch))
    assert f"f32[512,{scorer.vocabulary_size}]" in program  # a chunk
    assert f"2048,{scorer.vocabulary_size}]" not in program
    assert f"16,128,{scorer.vocabulary_size}]" not in program


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8])
@pytest.mark.parametrize("examples", [0, 200])
def test_each_row_is_in_a_batch_and_shapes_are_few(batch_size: int | None, examples: int) -> None:
    rng = np.random.default_rng(0)
    rows = [Row(ids(n, n), ids(k, n + k)) for n, k in rng.integers(1, 60, (40, 2))]
    rows += [Row(ids(n, n), ids(k, k)) for n in range(20, 60) for k in (1, 3, 5, 2)]
    rows = [Row([*ids(examples, 0), *row.context], row.continuation) for row in rows]
    seen: list[int] = []
    shapes = set()
    for contexts, batches, prefix in make_batches(rows, tokens=1024, batch_size=batch_size):
        if prefix is not None:
            shapes.add(prefix.tokens.shape)
        if contexts is not None:
            shapes.add(contexts.tokens.shape)
            assert len(contexts.tokens) <= (batch_size or 1024)
        for places, batch in batches:
            shapes.add((batch.tokens.shape, contexts and contexts.tokens.shape))
            seen += places
            assert len(batch.tokens) <= (batch_size or 1024)
            for i, place in enumerate(places):
                labels_T = batch.labels[i]
                assert labels_T[labels_T >= 0].tolist() == rows[place].continuation
                given = batch.tokens[i][batch.positions[i] >= 0].tolist()
                if contexts is not None and batch.owners is not None:
                    owner = batch.owners[i]
                    is_there = contexts.positions[owner] >= 0
                    given = [*contexts.tokens[owner][is_there].tolist(), *given]
                if prefix is not None:
                    given = [*prefix.tokens[prefix.positions >= 0].tolist(), *given]
                assert given == rows[place].inputs
            assert (batch.labels[len(places) :] == -1).all()
    assert sorted(seen) == list(range(len(rows)))
    assert len(shapes) <= 12


def read_tokens(rows: list[Row], **settings: Any) -> int:
    """Returns how many tokens a model reads, padding included."""
    works = list(make_batches(rows, tokens=1024, **settings))
    contexts = sum(work.contexts.tokens.size for work in works if work.contexts is not None)
    prefixes = {id(work.prefix): work.prefix for work in works if work.prefix is not None}
    contexts += sum(prefix.tokens.size for prefix in prefixes.values())
    return contexts + sum(batch.tokens.size for work in works for _, batch in work.batches)


@pytest.mark.parametrize("batch_size", [None, 1, 8])
def test_a_shared_context_is_read_once(batch_size: int | None) -> None:
    rows = [Row(ids(51, c), [k + 3]) for c in range(6) for k in range(4)]
    assert read_tokens(rows, batch_size=batch_size) <= 8 * 64 + 32 * 16
    many = [Row(ids(401, 0), [k % 100 + 3] * 3) for k in range(1000)]
    (work,) = make_batches(many, tokens=1024, batch_size=batch_size)
    assert work.contexts is not None and work.contexts.positions.max(axis=1).tolist()[0] == 399
    expected = 512 * (batch_size or 1)
    assert work.contexts.tokens.size <= expected
    assert read_tokens(many, batch_size=batch_size) <= expected + 1008 * 16
    # A long continuation does not make a batch larger than others.
    long = [Row(ids(11, 0), ids(n, n)) for n in (500, 480, 3, 4)]
    (work,) = make_batches(long, tokens=1024)
    assert {batch.tokens.shape for _, batch in work.batches} == {(2, 512)}


def test_what_contexts_begin_with_is_read_once() -> None:
    """Twenty questions with four answers behind the same examples, for each of two subjects."""
    rows = [
        Row([*ids(700, subject), *ids(40, 10 * subject + question)], [answer])
        for subject in (1, 2)
        for question in range(3, 23)
        for answer in (3, 4, 5, 6)
    ]
    works = list(make_batches(rows, tokens=2048))
    prefixes = {id(work.prefix): work.prefix for work in works}
    assert [x.positions.max() for x in prefixes.values() if x is not None] == [699, 699]
    # Each of the 40 questions, and each of the 160 answers, in one or two steps of padding.
    assert read_tokens(rows) <= 2 * 768 + 48 * 64 + 192 * 16
    # Rows of 741 tokens: beyond 720 each question is read whole; across 740 each row.
    assert 40 * 700 < read_tokens(rows, turning_lengths=[720]) < 80 * 700
    longer = [Row(row.context, row.continuation * 2) for row in rows]
    assert read_tokens(longer, turning_lengths=[740]) > 160 * 700


def test_runs_are_those_that_save_most() -> None:
    texts = ["abcdefgh1", "abcdefgh2", "abcdefgh3", "ab4", "ab5", "x6", "x7", "y"]
    contexts = [tuple(map(ord, text)) for text in texts]
    shuffled = [contexts[i] for i in (5, 0, 3, 7, 2, 6, 1, 4)]

    def found(worth: int) -> list[tuple[str, int]]:
        runs = find_runs(shuffled, worth)
        ends = [("".join(sorted(chr(shuffled[i][-1]) for i in x.contexts)), x.length) for x in runs]
        return sorted(ends)

    # "abcdefgh" twice saves 16, "ab" four times 8 and "ab" once more 2: less than the former.
    assert found(1) == [("123", 8), ("67", 1)]
    assert found(2) == [("123", 8)]
    assert found(17) == []
    assert find_runs([], 1) == find_runs(contexts[:1], 1) == []
    wide = [(*[1] * 30, i) for i in range(20)] + [(*[1] * 30, 99, 7), (*[1] * 30, 99, 8)]
    (run,) = find_runs(wide, 40)
    assert run.length == 30 and len(run.contexts) == 22


def test_results_do_not_depend_on_the_batches(scorer: flm.Scorer) -> None:
    alone = [scorer.score([row])[0] for row in ROWS[-2:]]
    for batch_size in (1, 4):
        for found, expected in zip(scorer.score(ROWS, batch_size)[-2:], alone, strict=True):
            logs = expected.token_log_probabilities
            np.testing.assert_allclose(found.token_log_probabilities, logs, atol=1e-5)
    assert scorer.score([]) == []


def test_long_work_shows_how_far_it_is(
    scorer: flm.Scorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer.score(ROWS, batch_size=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(scorer_module, "_QUIET_SECONDS", -1.0)
    scorer.score(ROWS, batch_size=4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"row {len(ROWS)} of {len(ROWS)}:")


# Perplexity ---------------------------------------------------------------------------------------


def test_windows_are_those_of_the_harness() -> None:
    """The example in `LM.loglikelihood_rolling` of lm-evaluation-harness, -1 as the prefix."""
    windows = list(rolling_windows([-1, *range(10)], window=4, stride=4))
    assert [row.inputs for row in windows] == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [row.continuation for row in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("window", "stride"), [(4, 1), (4, 3), (7, 7), (50, 20), (1, 1)])
def test_each_token_is_predicted_once(window: int, stride: int) -> None:
    rows = list(rolling_windows(range(30), window, stride))
    assert [i for row in rows for i in row.continuation] == list(range(1, 30))
    assert all(len(row.inputs) <= window and row.context for row in rows)
    assert all(len(row.inputs) == window for row in rows[1:])
    tokens = [*rows[-1].context, *rows[-1].continuation]
    assert tokens == list(range(30 - len(tokens), 30))


def test_perplexity_is_that_of_transformers(
    folder: Path, backbone: flm.Backbone, tokenizer: flm.Tokenizer
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = ids(60, 0)
    tensor = torch.tensor([row])
    with torch.no_grad():
        loss = float(model(tensor, labels=tensor).loss)
    found = flm.perplexity(backbone, row)
    assert found.per_token == pytest.approx(np.exp(loss), rel=1e-4)
    assert found.num_tokens == 59 and found.per_word is None
    # A stride, as Transformers' documentation has it; it does not count the inputs' last token.
    window, stride, done, total = 21, 10, 0, 0.0
    for begin in range(0, 60, stride):
        end = min(begin + window, 60)
        labels = tensor[:, begin:end].clone()
        labels[:, : -(end - done)] = -100
        with torch.no_grad():
            mean = float(model(tensor[:, begin:end], labels=labels).loss)
        total += mean * int((labels[:, 1:] != -100).sum())
        done = end
        if end == 60:
            break
    strided = flm.perplexity(backbone, row, window=window - 1, stride=stride)
    assert strided.log_probability == pytest.approx(-total, rel=0.02)  # the last window is full
    assert strided.num_tokens == 59


def test_perplexity_of_texts(backbone: flm.Backbone, tokenizer: flm.Tokenizer) -> None:
    texts = ["The quick brown fox", "jumps  over\nthe lazy dög"]
    found = flm.perplexity(backbone, texts)
    logs = []
    for text in texts:
        row = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        logs.append(flm.perplexity(backbone, row).log_probability)
    np.testing.assert_allclose(found.log_probabilities, logs, atol=1e-4)
    total, size = sum(logs), len("".join(texts).encode())
    assert (found.num_words, found.num_bytes) == (4 + 5, size)
    assert found.per_word == pytest.approx(np.exp(-total / 9), rel=1e-4)
    assert found.per_byte == pytest.approx(np.exp(-total / size), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-total / size / np.log(2), rel=1e-4)
    alone = flm.perplexity(backbone, texts[0], tokenizer, window=4)
    assert alone.num_tokens == len(tokenizer.encode(texts[0]))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "")], "Row 0: the continuation is empty"),
        ([("a", " b"), ("a", "", "c")], r"Row 1: expected \(context, continuation\)"),
        (["ab"], r"Row 0: expected \(context, continuation\), received 'ab'"),
        ("ab", "Expected a list of pairs"),
        ([("th", "e")], "Row 0: the continuation 'e' has no tokens of its own"),
        ([("", "<s>")], "Row 0: the continuation '<s>' has no tokens of its own"),
        ([([5], [])], "Row 0: the continuation is empty"),
        ([([], [5])], "Row 0: the context is empty"),
        ([("a", [5])], "Row 0: expected two texts or two lists of ids"),
        ([([5], "a")], "Row 0: expected a text or messages as context"),
        ([(None, "a")], "Row 0: expected a text or messages as context, received None"),
        ([([5], [999])], "Row 0: expected token ids from 0 to"),
        ([([5] * 511, [5, 5, 5])], "Row 0: 511 tokens of context and 3 of continuation. The model"),
    ],
)
def test_bad_rows(scorer: flm.Scorer, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(rows)


def test_the_longest_row_fits(scorer: flm.Scorer) -> None:
    (score,) = scorer.score([([5] * 511, [5, 5])], batch_size=1)  # reads 512 tokens
    assert score.num_tokens == 2


def test_bad_arguments(folder: Path, backbone: flm.Backbone, scorer: flm.Scorer) -> None:
    with pytest.raises(ValueError, match="batch size of at least 1, received 0"):
        scorer.score(ROWS, batch_size=0)
    with pytest.raises(ValueError, match="functional model with the outputs"):
        flm.score(backbone.get_layer("decoder_0"), ROWS)
    random = flm.Backbone.from_preset(folder, load_weights=False)
    with pytest.raises(ValueError, match="There is no tokenizer for texts"):
        flm.Scorer(random).score([("a", "b")])
    for window, stride in ((10, 11), (513, 1), (10, 0)):
        with pytest.raises(ValueError, match=f"Received: stride {stride}, window {window}"):
            flm.perplexity(scorer, "text", window=window, stride=stride)
    for text in ("", [5]):
        with pytest.raises(ValueError, match="Text 0 has no tokens to predict"):
            flm.perplexity(scorer, [text])
    with pytest.raises(ValueError, match="Expected at least one text"):
        flm.perplexity(scorer, [])
