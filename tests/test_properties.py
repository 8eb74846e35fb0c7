"""Properties that hold for every model of the zoo, over the one list of tiny configs.

What parts decide, and not the family that has them, runs for one config of each kind.
"""

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_KIND
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import read_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from functional_llm.formats.weight_table import (
    expand_table,
    export_weights,
    in_one_tensor,
    shapes_of,
)
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.layers.cache import make_cache
from functional_llm.presets.backbone import Backbone
from nightly import (
    FAMILIES_AND_KINDS,
    one_of_a_few,
    one_of_each_family,
    one_of_each_kind,
    one_of_each_way_of_seeing,
)
from pair import LENGTH, ROWS, SLOTS, TOKENS, Pair, compiled, random_tokens
from reference import attention_of, reference_greedy, reference_logits

JUNK = random_tokens(ROWS, LENGTH, seed=1)  # stands where padding is


def _assert_near(received: Any, expected: Any) -> None:
    np.testing.assert_allclose(received, expected, atol=1e-4, rtol=0)


def test_logits_equal_the_reference(pair: Pair) -> None:
    _assert_near(pair.logits, pair.expected)


@one_of_each_kind
def test_logits_of_a_long_text_equal_the_reference(pair: Pair) -> None:
    token_ids = random_tokens(2, 300)
    _assert_near(compiled(pair.ours)(token_ids), reference_logits(pair.reference, token_ids))


@one_of_a_few
def test_an_eager_call_and_its_padding_equal_the_reference(pair: Pair) -> None:
    token_ids, mask = TOKENS[:, :9], np.ones((ROWS, 9), int)
    mask[0, :4], mask[2, :8] = 0, 0
    # Each row alone: Transformers' short convolutions see biases where padding is.
    expected = np.zeros((ROWS, 9, pair.expected.shape[-1]), "float32")
    for i, row in enumerate(token_ids):
        expected[i, mask[i] == 1] = reference_logits(pair.reference, row[None, mask[i] == 1])
    logits = np.asarray(pair.ours({"token_ids": token_ids, "attention_mask": mask}))
    _assert_near(logits[mask == 1], expected[mask == 1])
    as_argument = pair.ours(token_ids, mask=mask == 1)
    np.testing.assert_array_equal(np.asarray(as_argument)[mask == 1], logits[mask == 1])


@one_of_each_way_of_seeing
def test_a_mask_of_ones_own_equals_the_reference_and_goes_through_the_cache(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    length = 9
    token_ids = TOKENS[:, :length]
    if _states(pair.ours):
        with pytest.raises(ValueError, match="Expected no mask: layers of the type"):
            pair.ours({"token_ids": token_ids, "mask": np.ones((ROWS, length, length), bool)})
        return
    mask = np.random.default_rng(5).random((ROWS, length, length)) < 0.6
    mask |= np.eye(length, dtype=bool)  # the reference makes NaN of a token that sees nothing
    config = pair.ours.config
    by_kind = {
        kind: torch.where(torch.tensor(mask & _sees(config, kind, length))[:, None], 0.0, -1e30)
        for kind in _kinds(config)
    }
    one = next(iter(by_kind.values()))
    given: dict[str, Any] = {"attention_mask": by_kind if len(by_kind) > 1 else one}
    if pair.reference.config.model_type == "bloom":  # which counts positions in a mask of two axes
        module = sys.modules[type(pair.reference).__module__]
        monkeypatch.setattr(module, "create_causal_mask", lambda **_: one)
        given = {}
    positions = torch.arange(length)[None]  # OPT counts them in a mask of rows
    expected = reference_logits(pair.reference, token_ids, position_ids=positions, **given)
    run = compiled(pair.ours)
    _assert_near(run({"token_ids": token_ids, "mask": mask}), expected)
    cache = make_cache(pair.ours, ROWS, length)
    for start, stop in ((0, 4), (4, 5), (5, length)):  # two shapes, each a program
        inputs = {"token_ids": token_ids[:, start:stop], "mask": mask[:, start:stop]}
        result = run({**inputs, "cache": cache})
        _assert_near(result["logits"], expected[:, start:stop])
        cache = result["cache"]


@one_of_each_way_of_seeing
def test_positions_follow_what_the_cache_holds(pair: Pair) -> None:
    cache = make_cache(pair.ours, ROWS, 2 * LENGTH)
    result = pair.run({"token_ids": TOKENS, "cache": cache})
    _assert_near(result["logits"], pair.logits)
    again = pair.run({"token_ids": TOKENS, "cache": result["cache"]})
    twice = np.tile(TOKENS, 2)
    expected = reference_logits(pair.reference, twice)[:, LENGTH:]
    _assert_near(again["logits"], expected)


@one_of_each_way_of_seeing
def test_greedy_text_equals_the_reference(pair: Pair) -> None:
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 7, 33)]
    expected = [reference_greedy(pair.reference, ids, 20) for ids in prompts]
    assert TextGenerator(pair.ours).generate_ids(prompts, max_new_tokens=20) == expected


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([LENGTH], id="whole", marks=one_of_each_way_of_seeing),
        pytest.param([1] * 20, id="token_by_token", marks=one_of_each_way_of_seeing),
        pytest.param([20, 1, 31, 1, 1, 18], id="mixed", marks=one_of_each_kind),
    ],
)
def test_chunks_through_the_cache_equal_the_full_forward(pair: Pair, chunks: list[int]) -> None:
    cache, start = make_cache(pair.ours, ROWS, SLOTS), 0
    for size in chunks:
        here = slice(start, start + size)
        inputs = {"token_ids": TOKENS[:, here], "cache": cache}
        if size > 1:
            rows = [(row[here], np.arange(start, start + size)) for row in TOKENS]
            inputs |= _padded(rows, ["right"] * ROWS)
        result = pair.run(inputs)
        _assert_near(result["logits"][:, :size], pair.logits[:, here])
        cache, start = result["cache"], start + size


def _padded(rows: list[Any], sides: list[str]) -> dict[str, np.ndarray]:
    """Returns token ids and positions of (ids, positions) a row, with padding on a side of each."""
    token_ids, positions = JUNK.copy(), np.full((ROWS, LENGTH), -1, "int32")
    for i, (ids, at) in enumerate(rows):
        here = _place(len(ids), sides[i])
        token_ids[i, here], positions[i, here] = ids, at
    return {"token_ids": token_ids, "positions": positions}


def _place(length: int, side: str) -> slice:
    return slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)


@one_of_each_kind
@pytest.mark.parametrize(
    "sides", [["left"] * ROWS, ["right", "left", "right"]], ids=["left", "both"]
)
def test_ragged_rows_equal_each_row_alone(pair: Pair, sides: list[str]) -> None:
    lengths = [5, 40, 17]
    rows = [(TOKENS[i, :n], np.arange(n)) for i, n in enumerate(lengths)]
    cache = make_cache(pair.ours, ROWS, SLOTS)
    result = pair.run({**_padded(rows, sides), "cache": cache})
    for i, length in enumerate(lengths):
        _assert_near(result["logits"][i, _place(length, sides[i])], pair.logits[i, :length])
    for step in range(4):  # four more tokens come one at a time
        following = [row[n + step : n + step + 1] for row, n in zip(TOKENS, lengths, strict=True)]
        result = pair.run({"token_ids": np.stack(following), "cache": result["cache"]})
        for i, length in enumerate(lengths):
            _assert_near(result["logits"][i, 0], pair.logits[i, length + step])


def test_a_cache_keeps_no_more_than_its_windows_in_the_models_dtype(pair: Pair) -> None:
    config, cache = pair.ours.config, make_cache(pair.ours, 2, 64)
    window = getattr(config, "sliding_window", None)
    for kind, group in cache.items():
        slots = window if kind == "sliding_attention" and window else 64
        slots = config.chunk_size if kind == "chunked_attention" else slots
        slots = 1 if kind in _states(pair.ours) else slots
        assert {x.shape[:2] for x in jax.tree.leaves(group)} == {(2, slots)}
        kept = {name: x for name, x in group.items() if name != "positions"}
        assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"float32"}


@one_of_each_kind
def test_influence(pair: Pair) -> None:
    """Changing token i moves exactly the positions that may see it, through all layers."""
    changed, at = TOKENS.copy(), 11
    changed[:, at] = (changed[:, at] + 1) % 128
    moved = np.abs(pair.run(changed) - pair.logits).max(axis=(0, 2)) > 1e-6
    expected = np.arange(LENGTH) == at
    for kind in _kinds(pair.ours.config):
        sees = _sees(pair.ours.config, kind, LENGTH)
        expected = (sees & expected).any(axis=1)
    np.testing.assert_array_equal(moved, expected)


def _kinds(config: Any) -> list[str]:
    """The type of each layer."""
    return list(getattr(config, "layer_types", ["sliding_attention"] * config.num_layers))


def _sees(config: Any, kind: str, length: int) -> np.ndarray:
    """Which tokens see which in layers of a type, (length, length)."""
    query, slot = np.arange(length)[:, None], np.arange(length)
    first = np.zeros_like(query)
    if kind == "sliding_attention" and getattr(config, "sliding_window", None):
        first = query - config.sliding_window + 1
    if kind == "chunked_attention":
        first = query // config.chunk_size * config.chunk_size
    if kind == "conv":
        first = query - config.convolution_width + 1
    return (slot <= query) & (slot >= first)


def _states(model: Any) -> set[str]:
    """Types of layers that keep a state: they have no mask."""
    return set(model.input["cache"]) - set(model.input["mask"])


@one_of_each_kind
def test_packed_segments_do_not_see_each_other(pair: Pair) -> None:
    positions, segments, places = np.full_like(TOKENS, -1), np.zeros_like(TOKENS), []
    for i, lengths in enumerate([[30, 1, 41], [72], [8, 20, 32]]):  # the last ends in padding
        for number, length in enumerate(lengths):
            here = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
            positions[i, here], segments[i, here] = np.arange(length), number
            places.append((i, here))
    packed = pair.run({"token_ids": TOKENS, "positions": positions, "segment_ids": segments})
    alone = np.concatenate([JUNK] * 3)
    for row, place in enumerate(places):
        alone[row, : TOKENS[place].size] = TOKENS[place]
    expected = np.concatenate([pair.run(rows) for rows in np.split(alone, 3)])
    for row, place in enumerate(places):
        _assert_near(packed[place], expected[row, : TOKENS[place].size])


def test_table_there_and_back_is_the_identity(pair: Pair) -> None:
    variables, config = pair.ours.variables, pair.ours.config
    family = next(f for f in FAMILIES.values() if type(config) is f.config_class)
    tensors = expand_table(family.rows(config), shapes_of(variables), config.num_layers)
    source = HuggingFaceDirectory(pair.folder, FAMILIES).open_tensors([x.name for x in tensors])
    exported = dict(export_weights(variables, tensors))
    assert set(exported) == set(source.shapes)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, source.read(name, "float32"))


def _parts(model: Any) -> set[Any]:
    """Returns kinds of layers with the variables they have, and how tensors become those."""
    layers = {
        (type(layer).__name__, *sorted(v.path.rpartition("/")[2] for v in layer.variables))
        for _, layer in flm.walk(model)
    }
    family = next(f for f in FAMILIES.values() if type(model.config) is f.config_class)
    changes = {
        (in_one_tensor(name) == name, x if isinstance(x, str) else (x.axis, x.groups > 1))
        for name, _, x in family.rows(model.config)
    }
    return layers | changes


@cache
def _parts_of_each_kind() -> set[Any]:
    parts = set[Any]()
    for name in ONE_OF_EACH_KIND:
        family = FAMILIES[CONFIGS[name]["model_type"]]
        config = read_config(CONFIGS[name], family)
        parts |= _parts(Backbone(*family.build(config), config=config))
    return parts


def test_one_of_each_kind_has_every_part(pair: Pair) -> None:
    others = _parts(pair.ours) - _parts_of_each_kind()
    assert not others, f"new parts: a config with them joins ONE_OF_EACH_KIND ({pair.name}?)"


@one_of_each_family
def test_transformers_loads_what_save_preset_wrote(pair: Pair, tmp_path: Path) -> None:
    import transformers

    saved = tmp_path / "saved"
    pair.ours.save_preset(saved, max_shard_bytes=20_000)
    assert len(list(saved.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation=attention_of(pair.reference.config), dtype="float32"
    ).eval()
    np.testing.assert_allclose(reference_logits(theirs, TOKENS), pair.expected, atol=1e-5, rtol=0)
    again = Backbone.from_preset(str(saved))
    assert again.config == pair.ours.config
    for ours, read in zip(pair.ours.variables, again.variables, strict=True):
        np.testing.assert_array_equal(ours.value, read.value)


@one_of_each_kind
@pytest.mark.parametrize("pair", FAMILIES_AND_KINDS, indirect=True)  # a family scales by itself
def test_bfloat16_is_as_near_as_the_reference(pair: Pair) -> None:
    import torch

    ours = Backbone.from_preset(pair.folder, dtype="bfloat16")
    scores = ("/router/", "/correction/")  # of experts: in float32
    others = [v for v in ours.variables if not any(x in v.path for x in scores)]
    assert {v.dtype for v in others} == {"bfloat16"}
    for kind, group in make_cache(ours, 1, 4).items():
        own = "float32" if kind in _states(ours) else "bfloat16"
        assert {x.dtype.name for x in jax.tree.leaves(group)} == {"int32", own}
    logits = compiled(ours)(TOKENS).astype("float32")
    theirs = reference_logits(copy.deepcopy(pair.reference).to(torch.bfloat16), TOKENS)
    assert np.abs(logits - pair.expected).mean() <= 1.5 * np.abs(theirs - pair.expected).mean()


@one_of_each_kind
def test_gradients_through_a_state_are_finite_in_bfloat16(pair: Pair) -> None:
    """Of 2048 tokens, over which decays multiply up."""
    if not _states(pair.ours):
        return
    ours = Backbone.from_preset(pair.folder, dtype="bfloat16")
    variables = (ours.trainable_variables, ours.non_trainable_variables)
    trained, fixed = jax.tree.map(lambda variable: variable.value, variables)
    token_ids = random_tokens(1, 2048)

    def loss(values: Any) -> Any:
        (logits, _) = ours.stateless_call(values, fixed, token_ids)
        logs = jax.nn.log_softmax(logits.astype("float32"))
        return -jax.numpy.take_along_axis(logs[:, :-1], token_ids[:, 1:, None], axis=2).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    assert np.isfinite(value)
    for variable, gradient in zip(ours.trainable_variables, gradients, strict=True):
        assert np.isfinite(np.asarray(gradient, "float32")).all(), variable.path
        assert (np.asarray(gradient, "float32") != 0).any(), variable.path
