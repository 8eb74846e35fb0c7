"""Properties that hold for every model of the zoo, over the one list of tiny configs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs import CONFIGS
from functional_llm import presets
from functional_llm.cache import make_cache
from functional_llm.convert.safetensors import open_safetensors
from functional_llm.convert.table import expand_table, export_weights
from functional_llm.generate import TextGenerator
from functional_llm.presets import Backbone
from reference import reference_greedy, reference_logits, save_reference


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Transformers model, and ours loaded from what it saved."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_reference(CONFIGS[request.param], folder)
    return SimpleNamespace(
        reference=reference, ours=Backbone.from_preset(str(folder)), folder=Path(folder)
    )


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, shape).astype("int32")


@pytest.mark.parametrize("length", [40, 300])
def test_logits_equal_the_reference(pair: Any, length: int) -> None:
    token_ids = _tokens(2, length, seed=length)
    expected = reference_logits(pair.reference, token_ids)
    logits = np.asarray(pair.ours(token_ids))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


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
    logits = np.asarray(pair.ours({"token_ids": token_ids, "positions": positions}))
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[40], [1] * 12, [5, 1, 20, 1, 1, 9], [32, 16]])
def test_chunks_through_the_cache_equal_the_full_forward(pair: Any, chunks: list[int]) -> None:
    token_ids = _tokens(2, sum(chunks), seed=3)
    expected = np.asarray(pair.ours(token_ids))
    cache, start = make_cache(pair.ours, 2, 64), 0
    for size in chunks:
        chunk = token_ids[:, start : start + size]
        result = pair.ours({"token_ids": chunk, "cache": cache})
        cache = result["cache"]
        np.testing.assert_allclose(
            np.asarray(result["logits"]), expected[:, start : start + size], atol=1e-4
        )
        start += size


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_equal_each_row_alone(pair: Any, side: str) -> None:
    lengths, size = [5, 13, 8], 16
    rows = [_tokens(1, n + 4, seed=n) for n in lengths]  # four more tokens come one at a time
    token_ids, positions = _tokens(3, size, seed=9), np.full((3, size), -1, "int32")
    for i, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(size - length, size)
        token_ids[i, at], positions[i, at] = rows[i][0, :length], np.arange(length)
    cache = make_cache(pair.ours, 3, 24)
    inputs = {"token_ids": token_ids, "positions": positions, "cache": cache}
    result = pair.ours(inputs)
    alone = [np.asarray(pair.ours(row))[0] for row in rows]
    for step in range(4):
        following = np.stack(
            [row[0, n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)]
        )
        result = pair.ours({"token_ids": following, "cache": result["cache"]})
        for i, length in enumerate(lengths):
            logits = np.asarray(result["logits"])[i, 0]
            np.testing.assert_allclose(logits, alone[i][length + step], atol=1e-4)


def test_influence(pair: Any) -> None:
    """Changing token i moves position i and those after it, and no other."""
    token_ids, at = _tokens(1, 24, seed=5), 11
    changed = token_ids.copy()
    changed[0, at] = (changed[0, at] + 1) % 128
    difference = np.abs(np.asarray(pair.ours(changed)) - np.asarray(pair.ours(token_ids)))
    moved = difference.max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, np.arange(24) >= at)


def test_packed_segments_do_not_see_each_other(pair: Any) -> None:
    lengths = [6, 1, 9]
    rows = [_tokens(1, n, seed=n) for n in lengths]
    packed = {
        "token_ids": np.concatenate(rows, axis=1),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype("int32"),
        "segment_ids": np.repeat(np.arange(3), lengths)[None].astype("int32"),
    }
    logits = np.asarray(pair.ours(packed))
    alone = np.concatenate([np.asarray(pair.ours(row)) for row in rows], axis=1)
    np.testing.assert_allclose(logits, alone, atol=1e-4)


def test_table_there_and_back_is_the_identity(pair: Any) -> None:
    family = presets.FAMILIES["llama"]
    variables = pair.ours.variables
    rows = expand_table(family.WEIGHTS, [v.path for v in variables], pair.ours.config.num_layers)
    source = open_safetensors(pair.folder)
    exported = dict(export_weights(variables, rows))
    assert set(exported) == set(source.shapes)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, source.read(name, "float32"))


def test_bfloat16_is_as_near_as_the_reference(pair: Any) -> None:
    import torch

    token_ids = _tokens(2, 40, seed=8)
    exact = reference_logits(pair.reference, token_ids)
    ours = Backbone.from_preset(str(pair.folder), dtype="bfloat16")
    assert {v.dtype for v in ours.variables} == {"bfloat16"}
    logits = np.asarray(ours(token_ids).astype("float32"))
    rounded = pair.reference.to(torch.bfloat16)
    theirs = reference_logits(rounded, token_ids)
    pair.reference.to(torch.float32)
    assert np.abs(logits - exact).mean() <= 1.5 * np.abs(theirs - exact).mean()
