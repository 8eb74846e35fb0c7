"""LongRoPE: other frequencies for texts beyond the length that a model was trained on at first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from reference import reference_logits, save_reference

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
