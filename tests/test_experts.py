"""Experts in a model: int8, adapters, capture and balance, in the graph and in its files."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import functional_llm as flm
from configs import CONFIGS
from functional_llm.graph.freezing import freeze_variables
from functional_llm.training.balancing import balance_loss
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
    values = (
        [v.value for v in x] for x in (model.trainable_variables, model.non_trainable_variables)
    )
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


def test_lora_changes_the_experts_as_merging_does(backbone: Any, tmp_path: Path) -> None:
    model = _with_lora(backbone)
    adapted = [path for path, layer in flm.walk(model) if hasattr(layer, "adapter_weights")]
    assert "decoder_0/mlp/experts_down" in adapted
    received = _logits(model)
    assert np.abs(received - _logits(backbone)).max() > 1e-2
    np.testing.assert_allclose(_logits(flm.peft.merge(model)), received, atol=1e-4)
    flm.peft.save_adapter(model, tmp_path)
    np.testing.assert_array_equal(_logits(flm.peft.load_adapter(backbone, tmp_path)), received)


def test_stock_keras_computes_the_same_in_int8_with_lora(
    backbone: Any, stock_keras: dict[str, StockKeras], tmp_path: Path
) -> None:
    model = _with_lora(flm.quantize(backbone))
    tokens = np.random.default_rng(0).integers(0, 100, (3, 72)).astype("int32")
    path = tmp_path / "model.keras"
    model.save(path)
    logits = _logits(model, tokens)
    np.savez(path.with_suffix(".npz"), token_ids=tokens, logits=logits, training="")
    found = stock_keras["torch"].result(path)
    assert found["logits"] < 1e-4
    assert found["decoded"] < 1e-4
    np.testing.assert_allclose(_logits(flm.Backbone.from_preset(path), tokens), logits, atol=1e-5)


def test_a_loss_for_balance_is_that_of_transformers(backbone: Any) -> None:
    mask = np.ones_like(TOKENS)
    mask[0, 7:] = 0
    routers = flm.capture(backbone, "decoder_*/mlp/router")
    result = routers({"token_ids": TOKENS, "attention_mask": mask})
    logits = [np.asarray(x) for x in result["captured"].values()]
    expected = load_balancing_loss_func(
        tuple(torch.tensor(x.reshape(-1, 6)) for x in logits), 6, 2, torch.tensor(mask)
    )
    received = balance_loss(logits, mask == 1, 2)
    np.testing.assert_allclose(received, float(expected), rtol=1e-5)

    balanced = flm.training.balance_experts(backbone, 10.0)
    np.testing.assert_array_equal(balanced(TOKENS), backbone(TOKENS))
    balanced.compile(keras.optimizers.SGD(0.0), remat="layer")
    inputs = {"token_ids": TOKENS, "attention_mask": mask}
    total = balanced.fit(inputs, verbose=0, batch_size=2).history["loss"][0]
    metrics = {metric.name: metric for metric in balanced.metrics}
    of_tokens = float(metrics["token_loss"].result())  # which leaves out what layers add
    np.testing.assert_allclose(total - of_tokens, 10 * float(expected), rtol=1e-4)


def test_capture_shows_which_experts_a_token_took(backbone: Any) -> None:
    captured = flm.capture(backbone, "decoder_*/mlp/dispatch", inputs=True)
    chosen = captured(TOKENS)["captured"]["decoder_0/mlp/dispatch"]
    assert chosen["experts"].shape == chosen["weights"].shape == (2, 11, 2)
    np.testing.assert_allclose(np.asarray(chosen["weights"]).sum(-1), 1, atol=1e-6)


def test_frozen_experts_stay_while_the_rest_trains(backbone: Any) -> None:
    model = flm.rewire(backbone)
    freeze_variables(model, [v for v in model.variables if "experts_" in v.path])
    before = {v.path: np.array(v.value) for v in model.variables}
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(TOKENS, verbose=0)
    moved = {
        v.path for v in model.variables if np.abs(np.array(v.value) - before[v.path]).max() > 0
    }
    assert moved == {path for path in before if "experts_" not in path}


def test_the_kernel_is_explained(backbone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ((path, kernel, reason),) = flm.expert_choices(backbone, 2, 100)
    assert (path, kernel) == ("decoder_0/mlp/dispatch", "walk")
    assert "400 rows are more than 16" in reason
    flm.explain_experts(backbone, 1, 1)
    assert "one_by_one: decoder_0/mlp/dispatch" in capsys.readouterr().out


class _Letters:
    """A tokenizer of letters."""

    add_bos = False

    def encode(self, text: str, *_: bool) -> list[int]:
        return [ord(x) - 32 for x in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(x + 32) for x in ids)


def test_a_picture_of_the_experts_that_a_text_used(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = _Letters()
    routing = flm.plot_routing(backbone, TOKENS[0])
    captured = flm.capture(backbone, "decoder_*/mlp/dispatch", inputs=True)
    chosen = np.asarray(captured(TOKENS[:1])["captured"]["decoder_0/mlp/dispatch"]["experts"])
    expected = [[(chosen == expert).mean() for expert in range(6)]]
    np.testing.assert_allclose(routing.shares, expected)
    assert routing.tokens == [str(x) for x in TOKENS[0]]
    text = "It costs $5, $6"
    by_token = flm.plot_routing(backbone, text, tmp_path / "folder" / "a.svg", True, tokenizer)
    assert by_token.tokens == list(text)
    assert b"<svg" in (tmp_path / "folder" / "a.svg").read_bytes()
    assert routing._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf, received .*a\.gif"):
        flm.plot_routing(backbone, TOKENS[0], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="TextGenerator, a `tokenizer`, or ids"):
        flm.plot_routing(backbone, text)
    with pytest.raises(ValueError, match="at most 200 tokens"):
        replace(by_token, tokens=["a"] * 201).figure()
    with pytest.raises(ValueError, match="model with experts"):
        flm.plot_routing(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), [1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        flm.plot_routing(backbone, TOKENS[0], tmp_path / "b.png")
