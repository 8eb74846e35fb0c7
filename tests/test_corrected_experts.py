"""Families whose experts are chosen by corrected scores: what only their checkpoints have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import functional_llm as flm
from configs import CONFIGS
from reference import reference_logits, save_reference

IDS = np.array([[5, 9, 2, 7, 33, 4, 1, 60]])


def _add(folder: Path, **tensors: np.ndarray) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path)


def test_a_layer_that_predicts_further_tokens_is_not_read(tmp_path: Path) -> None:
    model = save_reference(CONFIGS["glm4_moe_groups"], tmp_path)
    layer = "model.layers.{}.eh_proj.weight"
    _add(tmp_path, **{layer.format(2): np.ones((32, 64), "float32")})
    logits = np.asarray(flm.Backbone.from_preset(tmp_path)(IDS))
    np.testing.assert_allclose(logits, reference_logits(model, IDS), atol=1e-4, rtol=0)
    _add(tmp_path, **{layer.format(3): np.ones((32, 64), "float32")})
    with pytest.raises(ValueError, match=r"unknown tensor 'model\.layers\.3\.eh_proj\.weight'"):
        flm.Backbone.from_preset(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 4},  # of 6 experts
        {"n_group": 6, "topk_group": 5},  # of one expert each
        {"topk_group": 4},
        {"topk_group": 1, "num_experts_per_tok": 3},
    ],
)
def test_groups_that_do_not_come_out_even(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_reference(CONFIGS["glm4_moe_groups"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="n_group that divides n_routed_experts"):
        flm.Backbone.from_preset(tmp_path, load_weights=False)
