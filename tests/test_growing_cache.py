"""A cache that grows while text is written: the same text, few slots, few programs."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.generation import run, text_generator
from functional_llm.generation.programs import CompiledPrograms, DecodeState
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.layers.cache import num_slots
from reference import save_reference
from tiny import save_tiny

MODELS: dict[str, dict[str, Any]] = {
    "all_layers": CONFIGS["llama_grouped"],
    "a_ring": CONFIGS["mistral_window"],
    "full_and_rings": CONFIGS["gemma2_soft_caps"],
    "a_ring_that_grows": {**CONFIGS["mistral_window"], "sliding_window": 100},
    "full_and_rings_that_grow": {**CONFIGS["gemma2_soft_caps"], "sliding_window": 100},
}
# By day, those with all kinds of layers: what the others do is in these, too.
_waits = pytest.mark.nightly(unless=lambda x: x["backbone"].startswith("full_and_rings"))
# 16 slots to begin with, then 32, 64, 128 and 256: past a ring of 100.
STEPS = {"_SMALLEST_CACHE": 16, "_SLOTS_AHEAD": 4}
ROWS = [[5, 9, 20], [7], list(range(30, 51))]


@pytest.fixture(scope="module", params=MODELS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(MODELS[request.param], folder)
    return flm.Backbone.from_preset(str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of slots at every run of the decode loop."""
    seen: list[int] = []
    decode = CompiledPrograms.decode

    def note(self: CompiledPrograms, weights: Any, state: DecodeState, *arguments: Any) -> Any:
        seen.append(num_slots(state.cache))
        return decode(self, weights, state, *arguments)

    monkeypatch.setattr(CompiledPrograms, "decode", note)
    yield seen


def _in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEPS.items():
        monkeypatch.setattr(run, name, value)


@_waits
# A sampler sees no cache: that its keys go on is seen with one of them.
@pytest.mark.parametrize(
    ("backbone", "sampler"),
    [
        *((name, "greedy") for name in MODELS if name != "full_and_rings"),
        ("full_and_rings", "random"),
    ],
    indirect=["backbone"],
)
def test_a_cache_that_grows_writes_what_a_large_one_does(
    backbone: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    generator = TextGenerator(backbone)
    expected = generator.generate_ids(ROWS, 180, sampler, seed=3)
    large = sizes.copy()
    sizes.clear()
    _in_steps(monkeypatch)
    assert generator.generate_ids(ROWS, 180, sampler, seed=3) == expected
    assert len(set(large)) == 1
    limit = large[0]  # all that 201 tokens need, or the ring
    assert sorted(set(sizes)) == sorted({min(x, limit) for x in (32, 64, 128, 256)})


@pytest.fixture
def endless(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TextGenerator:
    """A generator with a tokenizer that knows of no end."""
    tokenizer = flm.Tokenizer.from_preset(str(folder))
    monkeypatch.setattr(type(tokenizer), "stop_token_ids", frozenset())
    return TextGenerator(flm.Backbone.from_preset(str(folder)), tokenizer)


def test_a_stream_grows_at_the_last_moment(
    endless: TextGenerator, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_generator, "_SECONDS_PER_PIECE", 1e-9)  # a token at a time
    prompt = list(range(30, 51))
    expected = list(endless.stream(prompt, 180))
    sizes.clear()
    _in_steps(monkeypatch)
    assert list(endless.stream(prompt, 180)) == expected
    # The run that stores position p needs p + 1 slots; the first one stores position 21.
    fits = [next(size for size in (32, 64, 128, 256) if size > 21 + i) for i in range(179)]
    assert sizes == fits


def test_a_piece_of_a_stream_has_as_many_tokens_as_its_time_allows(
    endless: TextGenerator, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for seconds, runs in ((1e-9, 70), (1e9, 4)):  # 1 from the prompt, then 1, 32, 32 and 5
        monkeypatch.setattr(text_generator, "_SECONDS_PER_PIECE", seconds)
        sizes.clear()
        texts.append("".join(endless.stream([5, 9, 20], 71)))
        assert len(sizes) == runs
    assert texts[0] == texts[1]


@_waits
def test_a_conversation_grows_within_and_between_its_turns(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TextGenerator(backbone)
    _in_steps(monkeypatch)
    prompt_cache, ids = flm.PromptCache(), [5, 9, 20]
    for count in (10, 60, 3, 90):
        ids += list(range(30, 40))
        fresh = generator.generate_ids([ids], count)[0]
        again: list[int] = []
        for new in generator._run([ids], count, "greedy", [], None, prompt_cache, seconds=1e-9):
            again += new.ids[0]
        assert again == fresh
        assert (generator.stats.prefill_tokens < len(ids)) == (len(ids) > 13)
        assert prompt_cache.ids == ids + again[:-1]
        ids += again


def test_the_cache_of_an_earlier_turn_is_let_go(folder: Path) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(str(folder)))
    prompt_cache = flm.PromptCache()
    list(generator._run([[5, 9]], 8, "greedy", [], 0, prompt_cache))
    before = [weakref.ref(x) for x in jax.tree.leaves(prompt_cache.cache)]
    pieces = generator._run([[*prompt_cache.ids, 7]], 8, "greedy", [], 0, prompt_cache)
    next(pieces)
    assert generator.stats.prefill_tokens == 1
    assert [ref() for ref in before] == [None] * len(before)


def test_a_text_that_ends_early_has_a_small_cache(folder: Path, sizes: list[int]) -> None:
    backbone = flm.Backbone.from_preset(str(folder))
    generator = TextGenerator(backbone)
    backbone.config = None  # no limit on the context
    free = generator.generate_ids([[5, 9]], 60)[0]
    stop = next(x for i, x in enumerate(free) if i > 3 and x not in free[:i])
    sizes.clear()
    ended = generator.generate_ids([[5, 9]], 100_000, stop_token_ids=[stop])[0]
    assert ended == free[: free.index(stop) + 1]
    assert set(sizes) == {512}
    sizes.clear()
    generator.generate_ids([[5, 9]], 200, stop_token_ids=[stop])
    assert set(sizes) == {256}


def test_a_row_that_has_ended_needs_no_slots(
    folder: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(str(folder)))
    _in_steps(monkeypatch)
    long = list(range(30, 51)) * 5
    stop = generator.generate_ids([long], 1)[0][0]
    short = next([i] for i in range(9) if stop not in generator.generate_ids([[i]], 40)[0])
    expected = generator.generate_ids([short], 40)[0]
    sizes.clear()
    result = generator.generate_ids([long, short], 40, stop_token_ids=[stop])
    assert result == [[stop], expected]
    assert set(sizes) == {128}  # 105 + 40 tokens are more


def test_a_doubling_compiles_a_copy_and_a_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(str(folder)))
    generator.generate_ids([[1, 2, 3]], 253)
    assert generator.num_compilations == 2  # as for a few tokens
    generator.generate_ids([[1, 2, 3]], 4)
    assert generator.num_compilations == 2
    _in_steps(monkeypatch)
    generator = TextGenerator(generator.backbone)
    for count, programs in ((8, 2), (13, 2), (14, 2), (15, 4), (60, 6), (60, 6), (14, 6)):
        generator.generate_ids([[1, 2, 3]], count)
        assert generator.num_compilations == programs
    assert generator.stats.decode_tokens == 13
    assert generator.stats.prefill_tokens == 3


def test_a_ring_at_its_size_compiles_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_reference(CONFIGS["mistral_window"], tmp_path)
    generator = TextGenerator(flm.Backbone.from_preset(str(tmp_path)))
    _in_steps(monkeypatch)
    for count in (3, 100, 300):
        assert len(generator.generate_ids([[1, 2, 3]], count)[0]) == count
        assert generator.num_compilations == 2


def test_time_of_growing_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TextGenerator(flm.Backbone.from_preset(str(folder)))
    grown = generator._programs.grow(flm.make_cache(generator.backbone, 1, 16), 64)
    assert num_slots(grown) == 64
    assert generator.stats.compile_seconds > 0
    assert generator.stats.prefill_seconds > 0
    before = generator.stats.prefill_seconds
    generator._programs.grow(grown, 128)
    assert generator.stats.decode_seconds > 0
    assert generator.stats.prefill_seconds == before
    assert all(np.asarray(group["positions"]).max() == -1 for group in grown.values())
