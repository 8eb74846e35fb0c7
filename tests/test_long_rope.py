"""LongRoPE: other frequencies for texts beyond the length that a model was trained on at first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.layers.long_texts import IsLongText, turning_lengths
from functional_llm.stock import exporting
from pair import compiled
from reference import reference_greedy, reference_logits, save_reference

ORIGINAL = 24
LONG = {**CONFIGS["phi3_long_texts"], "original_max_position_embeddings": ORIGINAL}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, flm.Backbone]:
    folder: Path = tmp_path_factory.mktemp("long")
    return save_reference(LONG, folder), flm.Backbone.from_preset(folder)


def _tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 128, (1, length)).astype("int32")


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 300])
def test_logits_on_both_sides_of_the_original_length(
    pair: tuple[Any, flm.Backbone], length: int
) -> None:
    reference, backbone = pair
    ids = _tokens(length)
    np.testing.assert_allclose(backbone(ids), reference_logits(reference, ids), atol=1e-4)


def test_each_row_of_a_batch_is_long_or_not_on_its_own(pair: tuple[Any, flm.Backbone]) -> None:
    reference, backbone = pair
    short, long = _tokens(10), _tokens(40)
    ids = np.concatenate([np.pad(short, ((0, 0), (0, 30))), long])
    positions = np.where(np.arange(40) < [[10], [40]], np.arange(40), -1).astype("int32")
    logits = np.asarray(backbone({"token_ids": ids, "positions": positions}))
    np.testing.assert_allclose(logits[:1, :10], reference_logits(reference, short), atol=1e-4)
    np.testing.assert_allclose(logits[1:], reference_logits(reference, long), atol=1e-4)


def test_each_segment_of_a_row_is_long_or_not_on_its_own(pair: tuple[Any, flm.Backbone]) -> None:
    reference, backbone = pair
    texts = [_tokens(40), _tokens(10), _tokens(30)]
    inputs = {
        "token_ids": np.concatenate(texts, axis=1),
        "positions": np.concatenate([np.arange(x.shape[1]) for x in texts])[None].astype("int32"),
        "segment_ids": np.repeat([7, 3, 0], [x.shape[1] for x in texts])[None].astype("int32"),
    }
    expected = np.concatenate([reference_logits(reference, x) for x in texts], axis=1)
    np.testing.assert_allclose(backbone(inputs), expected, atol=1e-4)


@pytest.fixture(scope="module")
def generator(pair: tuple[Any, flm.Backbone]) -> TextGenerator:
    return TextGenerator(pair[1])


class Uncached:
    """Greedy ids of the graph, which reads every text whole."""

    def __init__(self, model: Any) -> None:
        self.run = compiled(model)

    def __call__(self, ids: Sequence[int], count: int, **inputs: Any) -> list[int]:
        tokens = np.zeros((1, 64), "int32")
        tokens[0, : len(ids)] = ids
        for length in range(len(ids), len(ids) + count):
            positions = np.where(np.arange(64) < length, np.arange(64), -1).astype("int32")
            logits = self.run({"token_ids": tokens, "positions": positions[None], **inputs})
            tokens[0, length] = np.argmax(logits[0, length - 1])
        return tokens[0, len(ids) : len(ids) + count].tolist()


@pytest.fixture(scope="module")
def uncached(pair: tuple[Any, flm.Backbone]) -> Uncached:
    return Uncached(pair[1])


@pytest.mark.parametrize("before", [12, 1, 0, -1, -6])
def test_text_goes_on_beyond_the_original_length_as_transformers_writes_it(
    pair: tuple[Any, flm.Backbone], generator: TextGenerator, uncached: Uncached, before: int
) -> None:
    ids = _tokens(ORIGINAL - before)[0].tolist()
    new = generator.generate_ids([ids], max_new_tokens=20)[0]
    assert new == uncached(ids, 20)
    assert new == reference_greedy(pair[0], ids, 20, use_cache=True)


def test_the_keys_of_a_short_text_are_of_no_use_to_a_long_one(
    pair: tuple[Any, flm.Backbone], uncached: Uncached
) -> None:
    """Without reading again, other text comes out: the tests here can fail."""
    _, backbone = pair
    ids = _tokens(12)[0].tolist()
    new = uncached(ids, 28)
    text, run = np.array([ids + new], "int32"), compiled(backbone)
    cache, stale = flm.make_cache(backbone, 1, 64), []
    for i in range(0, 40, 4):
        result = run({"token_ids": text[:, i : i + 4], "cache": cache})
        cache = result["cache"]
        stale += result["logits"][0].argmax(-1).tolist()
    assert stale[11 : ORIGINAL - 1] == new[: ORIGINAL - 12]
    assert stale[ORIGINAL:-1] != new[ORIGINAL - 11 :]


def test_rows_turn_long_one_by_one(generator: TextGenerator, uncached: Uncached) -> None:
    rows = [_tokens(length)[0].tolist() for length in (5, ORIGINAL - 2, ORIGINAL - 9, 30)]
    free = [uncached(row, 22) for row in rows]
    assert generator.generate_ids(rows, max_new_tokens=22) == free
    # A row that has ended waits, whatever the others do.
    stop = free[1][1]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert generator.generate_ids(rows, 22, stop_token_ids=[stop]) == expected


def test_it_is_read_again_once(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    prefill = generator._programs.prefill

    def note(slots: int, weights: Any, prompt: Any, *rest: Any) -> Any:
        read.append(int((prompt.positions >= 0).sum()))
        return prefill(slots, weights, prompt, *rest)

    monkeypatch.setattr(generator._programs, "prefill", note)
    generator.generate_ids(_tokens(10), ORIGINAL - 10 + 1)
    assert read == [10]
    generator.generate_ids(_tokens(10), 40)
    assert read == [10, 10, ORIGINAL + 1]
    stats = generator.stats
    assert (stats.prefill_tokens, stats.decode_tokens) == (10, 39)


def test_a_stream_and_its_pieces(generator: TextGenerator, uncached: Uncached) -> None:
    ids = _tokens(20)[0].tolist()
    run = generator._run([ids], 16, "greedy", [], None, seconds=1e-9)
    pieces = [new.ids[0] for new in run]
    assert [len(piece) for piece in pieces] == [1] * 16
    assert sum(pieces, []) == uncached(ids, 16)


def _turn(generator: TextGenerator, ids: list[int], count: int, past: flm.PromptCache) -> list[int]:
    return [i for new in generator._run([ids], count, "greedy", [], 0, past) for i in new.ids[0]]


@pytest.mark.parametrize(
    ("lengths", "read"),
    [
        ((10, 32, 42), [10, 32, 2]),  # the second is long
        ((10, ORIGINAL, 34), [10, 6, 2]),  # the second becomes long
        ((30, 12, 16), [30, 12, 1]),  # the second was cut short
    ],
)
def test_a_conversation_forgets_what_was_read_as_another_kind(
    generator: TextGenerator, uncached: Uncached, lengths: Sequence[int], read: list[int]
) -> None:
    past, ids = flm.PromptCache(), _tokens(40)[0].tolist()
    fed = []
    for length in lengths:
        ids = (ids[:length] + _tokens(60)[0].tolist())[:length]
        new = _turn(generator, ids, 9, past)
        assert new == uncached(ids, 9)
        fed.append(generator.stats.prefill_tokens)
        ids += new
        assert past.ids == ids[:-1]
    assert fed == read


@pytest.mark.parametrize("sampler", ["random", flm.samplers.make(top_k=20, repetition_penalty=1.3)])
def test_random_numbers_go_on(
    generator: TextGenerator, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is drawn from what its text as a prompt gives, by the numbers of its step."""
    ids = _tokens(18)[0].tolist()
    new = generator.generate_ids([ids], 14, sampler, seed=5)[0]
    assert new != generator.generate_ids([ids], 14, sampler, seed=6)[0]
    for count in (3, 6, 7, 8, 13):
        request = [ids + new[:count]]
        step = np.int32(count)
        prefill = generator._programs.prefill

        def later(slots: int, weights: Any, prompt: Any, *rest: Any) -> Any:
            return prefill(slots, weights, prompt._replace(step=step), *rest)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(generator._programs, "prefill", later)
            assert generator.generate_ids(request, 1, sampler, seed=5)[0] == [new[count]]


def test_a_mask_of_the_prompt_holds_when_it_is_read_again(
    generator: TextGenerator, uncached: Uncached
) -> None:
    ids, mask = _tokens(20)[0].tolist(), np.ones((64, 64), bool)
    mask[8:, 2:5] = False
    expected = uncached(ids, 10, mask=mask[None])
    assert expected != uncached(ids, 10)
    assert generator.generate_ids([ids], 10, mask=mask[None, :20, :20]) == [expected]


def test_what_a_graph_says_counts_and_an_edit_keeps_it(pair: tuple[Any, flm.Backbone]) -> None:
    _, backbone = pair
    ids = _tokens(20)[0].tolist()
    edited = flm.peft.merge(flm.peft.lora(backbone, rank=2))
    assert turning_lengths(edited) == [ORIGINAL]
    assert TextGenerator(edited).generate_ids([ids], 9)[0] == Uncached(edited)(ids, 9)

    def later(layer: Any, path: str) -> Any:
        return IsLongText(length=28, name=layer.name) if isinstance(layer, IsLongText) else layer

    other = flm.rewire(backbone, later)
    assert turning_lengths(other) == [28]
    assert TextGenerator(other).generate_ids([ids], 12)[0] == Uncached(other)(ids, 12)


def test_a_saved_loop_reads_no_text_again(
    pair: tuple[Any, flm.Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    tokenizer: Any = object()
    monkeypatch.setattr(exporting, "export_text_model", lambda *given: written.append(given))
    pair[1].export(tmp_path / "saved", "tf_saved_model", tokenizer=tokenizer)
    assert written[0][-1] == ORIGINAL
