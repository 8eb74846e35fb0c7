"""Properties that hold for every model of the zoo, over the one list of tiny configs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.weight_table import expand_table, export_weights
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.layers.cache import make_cache
from functional_llm.presets.backbone import Backbone
from reference import reference_greedy, reference_logits, save_reference


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Transformers model, and ours loaded from what it saved.

    `run` is our model in one compiled program a shape: eager calls compile every operation.
    """
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_reference(CONFIGS[request.param], folder)
    ours = Backbone.from_preset(str(folder))
    return SimpleNamespace(reference=reference, ours=ours, run=_compiled(ours), folder=Path(folder))


def _compiled(backbone: Backbone) -> Callable[[Any], Any]:
    values = [variable.value for variable in backbone.variables]
    program = jax.jit(lambda values, inputs: backbone.stateless_call(values, [], inputs)[0])
    return lambda inputs: jax.tree.map(np.asarray, program(values, inputs))


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, shape).astype("int32")


def test_a_plain_call_gives_logits(pair: Any) -> None:
    token_ids = _tokens(2, 9)
    expected = reference_logits(pair.reference, token_ids)
    np.testing.assert_allclose(np.asarray(pair.ours(token_ids)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [40, 300])
def test_logits_equal_the_reference(pair: Any, length: int) -> None:
    token_ids = _tokens(2, length, seed=length)
    expected = reference_logits(pair.reference, token_ids)
    np.testing.assert_allclose(pair.run(token_ids), expected, atol=1e-4, rtol=0)


def test_greedy_text_equals_the_reference(pair: Any) -> None:
    prompts = [_tokens(n, seed=n).tolist() for n in (1, 7, 33)]
    expected = [reference_greedy(pair.reference, ids, 20) for ids in prompts]
    assert TextGenerator(pair.ours).generate_ids(prompts, max_new_tokens=20) == expected


def test_left_padding_equals_the_reference(pair: Any) -> None:
    import torch

    lengths, size = [9, 30, 1], 30
    token_ids, mask = _tokens(3, size), np.zeros((3, size), int)
    for row, length in enumerate(lengths):
        mask[row, size - length :] = 1
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype("int32")
    expected = reference_logits(
        pair.reference,
        token_ids,
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(np.maximum(positions, 0)),
    )
    logits = pair.run({"token_ids": token_ids, "positions": positions})
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [5, 1, 20, 1, 1, 12], [32, 8]])
def test_chunks_through_the_cache_equal_the_full_forward(pair: Any, chunks: list[int]) -> None:
    token_ids = _tokens(2, 40, seed=3)
    expected = pair.run(token_ids)
    cache, start = make_cache(pair.ours, 2, 64), 0
    for size in chunks:
        chunk = token_ids[:, start : start + size]
        result = pair.run({"token_ids": chunk, "cache": cache})
        cache = result["cache"]
        np.testing.assert_allclose(
            result["logits"], expected[:, start : start + size], atol=1e-4, rtol=0
        )
        start += size


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_equal_each_row_alone(pair: Any, side: str) -> None:
    lengths, size = [5, 13, 8], 16
    rows = [_tokens(1, 20, seed=n) for n in lengths]
    alone = [pair.run(row)[0] for row in rows]
    token_ids, positions = _tokens(3, size, seed=9), np.full((3, size), -1, "int32")
    for i, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(size - length, size)
        token_ids[i, at], positions[i, at] = rows[i][0, :length], np.arange(length)
    cache = make_cache(pair.ours, 3, 24)
    result = pair.run({"token_ids": token_ids, "positions": positions, "cache": cache})
    for step in range(4):  # four more tokens come one at a time
        following = [row[0, n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)]
        result = pair.run({"token_ids": np.stack(following), "cache": result["cache"]})
        for i, length in enumerate(lengths):
            logits = result["logits"][i, 0]
            np.testing.assert_allclose(logits, alone[i][length + step], atol=1e-4, rtol=0)


def test_a_ring_keeps_no_more_than_its_window(pair: Any) -> None:
    config, cache = pair.ours.config, make_cache(pair.ours, 2, 64)
    window = getattr(config, "sliding_window", None)
    for kind, group in cache.items():
        slots = window if kind == "sliding_attention" and window else 64
        assert {x.shape[:2] for x in jax.tree.leaves(group)} == {(2, slots)}


def test_influence(pair: Any) -> None:
    """Changing token i moves exactly the positions that may see it, through all layers."""
    token_ids, at, size = _tokens(1, 40, seed=5), 11, 40
    changed = token_ids.copy()
    changed[0, at] = (changed[0, at] + 1) % 128
    difference = np.abs(pair.run(changed) - pair.run(token_ids))
    moved = difference.max(axis=(0, 2)) > 1e-6
    distance = np.arange(size)[:, None] - np.arange(size)
    expected = np.arange(size) == at
    for window in _windows(pair.ours.config):
        sees = (distance >= 0) & (distance < window)
        expected = (sees & expected).any(axis=1)
    np.testing.assert_array_equal(moved, expected)


def _windows(config: Any) -> list[float]:
    """How many positions a token sees in each layer."""
    window = getattr(config, "sliding_window", None) or np.inf
    kinds = getattr(config, "layer_types", ["sliding_attention"] * config.num_layers)
    return [window if kind == "sliding_attention" else np.inf for kind in kinds]


def test_packed_segments_do_not_see_each_other(pair: Any) -> None:
    lengths = [6, 1, 6]
    rows = [_tokens(1, n, seed=n) for n in lengths]
    packed = {
        "token_ids": np.concatenate(rows, axis=1),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype("int32"),
        "segment_ids": np.repeat(np.arange(3), lengths)[None].astype("int32"),
    }
    logits = pair.run(packed)
    alone = np.concatenate([pair.run(row) for row in rows], axis=1)
    np.testing.assert_allclose(logits, alone, atol=1e-4)


def test_table_there_and_back_is_the_identity(pair: Any) -> None:
    variables, config = pair.ours.variables, pair.ours.config
    family = next(f for f in FAMILIES.values() if isinstance(config, f.config_class))
    tensors = expand_table(family.weights, [v.path for v in variables], config.num_layers)
    source = open_safetensors(pair.folder)
    exported = dict(export_weights(variables, tensors))
    assert set(exported) == set(source.shapes)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, source.read(name, "float32"))


def test_transformers_loads_what_save_preset_wrote(pair: Any, tmp_path: Path) -> None:
    import transformers

    saved = tmp_path / "saved"
    pair.ours.save_preset(saved, max_shard_bytes=20_000)
    assert len(list(saved.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation="eager", dtype="float32"
    ).eval()
    token_ids = _tokens(2, 100, seed=4)
    expected = reference_logits(pair.reference, token_ids)
    np.testing.assert_allclose(reference_logits(theirs, token_ids), expected, atol=1e-5, rtol=0)
    again = Backbone.from_preset(str(saved))
    assert again.config == pair.ours.config
    for ours, read in zip(pair.ours.variables, again.variables, strict=True):
        np.testing.assert_array_equal(ours.value, read.value)


def test_bfloat16_is_as_near_as_the_reference(pair: Any) -> None:
    import torch

    token_ids = _tokens(2, 40, seed=8)
    exact = reference_logits(pair.reference, token_ids)
    ours = Backbone.from_preset(str(pair.folder), dtype="bfloat16")
    assert {v.dtype for v in ours.variables} == {"bfloat16"}
    logits = _compiled(ours)(token_ids).astype("float32")
    rounded = pair.reference.to(torch.bfloat16)
    theirs = reference_logits(rounded, token_ids)
    pair.reference.to(torch.float32)
    assert np.abs(logits - exact).mean() <= 1.5 * np.abs(theirs - exact).mean()
