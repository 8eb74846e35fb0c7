"""Layers on the same input as one."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from reference import save_reference

ONE_OF_EACH_FAMILY = list({x["model_type"]: n for n, x in reversed(CONFIGS.items())}.values())


@pytest.fixture(scope="module", params=ONE_OF_EACH_FAMILY)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(CONFIGS[request.param], folder)
    return flm.Backbone.from_preset(folder)


def _logits(model: Any) -> np.ndarray:
    return np.asarray(model(np.random.default_rng(0).integers(0, 100, (2, 9)).astype("int32")))


def test_fused_projections_compute_the_same(backbone: Any) -> None:
    fused = flm.fuse_projections(backbone)
    assert type(fused) is type(backbone)
    assert fused.count_params() == backbone.count_params()
    np.testing.assert_allclose(_logits(fused), _logits(backbone), atol=1e-4)
    paths = {path for path, _ in flm.walk(fused)}
    assert not paths & {f"decoder_0/attention/{name}" for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="joined already"):
        flm.fuse_projections(fused)


def test_fused_projections_generate_train_and_travel(tmp_path: Path) -> None:
    save_reference(CONFIGS["llama_grouped"], tmp_path / "reference")
    backbone = flm.Backbone.from_preset(tmp_path / "reference")
    fused = flm.fuse_projections(backbone)
    prompt = [[3, 1, 4, 1, 5]]
    expected = flm.TextGenerator(backbone).generate_ids(prompt, max_new_tokens=6)
    assert flm.TextGenerator(fused).generate_ids(prompt, max_new_tokens=6) == expected
    fused.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_logits(loaded), _logits(fused), atol=1e-5)
    adapted = flm.peft.lora(fused, rank=2, targets="all", seed=0)
    assert "decoder_0/attention/key_query_value" in dict(flm.walk(adapted))
    np.testing.assert_allclose(_logits(adapted), _logits(fused), atol=1e-6)


def test_layers_with_adapters_or_in_int8_stay_apart(tmp_path: Path) -> None:
    save_reference(CONFIGS["llama_grouped"], tmp_path)
    backbone = flm.Backbone.from_preset(tmp_path)
    paths = dict(flm.walk(flm.fuse_projections(flm.peft.lora(backbone, targets="query"))))
    assert {"decoder_0/attention/query", "decoder_0/attention/key_value"} <= set(paths)
    with pytest.raises(ValueError, match="be quantised"):
        flm.fuse_projections(flm.quantize(backbone))
