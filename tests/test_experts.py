"""Experts in a model: int8, adapters, capture and balance, in the graph as it is and in its files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from reference import save_reference
from stock import StockKeras

NAME = "qwen3_moe_some_dense"
TOKENS = np.random.default_rng(0).integers(0, 100, (2, 11)).astype("int32")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(NAME)
    save_reference(CONFIGS[NAME], folder)
    return flm.Backbone.from_preset(folder)


def _logits(model: Any, inputs: Any = TOKENS) -> np.ndarray:
    values = ([v.value for v in x] for x in (model.trainable_variables, model.non_trainable_variables))
    trained, others = values
    return np.asarray(jax.jit(lambda x: model.stateless_call(trained, others, x)[0])(inputs))


def _with_lora(model: Any) -> Any:
    model = flm.peft.lora(model, rank=2, targets=["query", "experts_*"], seed=0)
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + random.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def test_experts_take_a_byte_a_number_and_routers_stay(backbone: Any) -> None:
    quantized = flm.quantize(backbone)
    dtypes = {v.path: v.dtype for v in quantized.variables}
    assert dtypes["decoder_0/mlp/experts_up/kernel"] == "int8"
    assert dtypes["decoder_0/mlp/router/kernel"] == "float32"
    expected = _logits(backbone)
    error = np.abs(_logits(quantized) - expected)
    assert 0 < error.mean() < 0.05 * expected.std()


def test_lora_changes_the_experts_as_merging_does(backbone: Any) -> None:
    model = _with_lora(backbone)
    adapted = [path for path, layer in flm.walk(model) if hasattr(layer, "adapter_weights")]
    assert "decoder_0/mlp/experts_down" in adapted
    received = _logits(model)
    assert np.abs(received - _logits(backbone)).max() > 1e-2
    np.testing.assert_allclose(_logits(flm.peft.merge(model)), received, atol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_stock_keras_computes_the_same(
    backbone: Any, stock_keras: dict[str, StockKeras], tmp_path: Path, int8: bool
) -> None:
    model = _with_lora(flm.quantize(backbone) if int8 else backbone)
    tokens = np.random.default_rng(0).integers(0, 100, (3, 72)).astype("int32")
    path = tmp_path / "model.keras"
    model.save(path)
    logits = _logits(model, tokens)
    np.savez(path.with_suffix(".npz"), token_ids=tokens, logits=logits, training="")
    for backend in ("jax", "torch", "tensorflow"):
        found = stock_keras[backend].result(path)
        assert found["logits"] < 1e-4
        assert found["decoded"] < 1e-4
    np.testing.assert_allclose(_logits(flm.Backbone.from_preset(path), tokens), logits, atol=1e-5)
