"""float32 is float32 on every chip: the programs ask for it, unless the user asks otherwise."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.training import LossModel
from nightly import FAMILIES_AND_KINDS, one_of_each_kind

IDS = np.arange(16, dtype="int32").reshape(2, 8)


def _tiny(folder: Path, dtype: str, name: str = "gemma2_soft_caps") -> flm.Backbone:
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return flm.Backbone.from_preset(folder, dtype=dtype, load_weights=False)


def _precisions(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """Returns what the products of a function ask for."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    return {re.findall(r"precision = (\[\w+, \w+\])", line)[0] for line in products}


def _forward(model: keras.Model) -> set[str]:
    groups = model.trainable_variables, model.non_trainable_variables
    values = [[variable.value for variable in group] for group in groups]
    return _precisions(lambda *inputs: model.stateless_call(*inputs)[0], *values, IDS)


HIGHEST, DEFAULT = {"[HIGHEST, HIGHEST]"}, {"[DEFAULT, DEFAULT]"}


@one_of_each_kind
@pytest.mark.parametrize("name", FAMILIES_AND_KINDS)
def test_a_forward_pass(tmp_path: Path, name: str) -> None:
    backbone = _tiny(tmp_path, "float32", name)
    assert _forward(backbone) == HIGHEST
    assert _precisions(lambda ids: backbone(ids), IDS) == HIGHEST


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_narrower_products_are_left_alone(tmp_path: Path, dtype: str) -> None:
    backbone = _tiny(tmp_path, dtype)
    assert _forward(backbone) == DEFAULT
    assert _forward(flm.peft.lora(backbone, rank=2)) == DEFAULT
    assert _forward(LossModel(backbone)) == DEFAULT


@pytest.mark.parametrize("setting", ["tensorfloat32", "default", "bfloat16"])
def test_what_the_user_has_set_wins(tmp_path: Path, setting: str) -> None:
    backbone = _tiny(tmp_path, "float32")
    expected = _precisions(lambda x: x @ x, jnp.ones((2, 2)))
    assert expected == DEFAULT
    with jax.default_matmul_precision(setting):
        expected = _precisions(lambda x: x @ x, jnp.ones((2, 2)))
        assert _forward(backbone) == expected != HIGHEST
    assert _forward(backbone) == HIGHEST


def _step(model: Any) -> set[str]:
    """Returns what the products of a compiled model's training step ask for."""
    model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in groups)
    return _precisions(model.train_step, state, (IDS, IDS))


@pytest.mark.parametrize("remat", [False, True])
def test_a_training_step_and_its_gradients(tmp_path: Path, remat: bool) -> None:
    model = LossModel(flm.peft.lora(_tiny(tmp_path, "float32"), rank=2), remat=remat)
    model.compile("adamw")
    assert _step(model) == HIGHEST


def test_a_training_step_with_a_loss_of_logits(tmp_path: Path) -> None:
    backbone = _tiny(tmp_path, "float32", "llama_grouped")
    backbone.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    backbone.train_on_batch(IDS, IDS)  # Keras makes the metrics
    assert _step(backbone) == HIGHEST


@pytest.mark.parametrize("remat", ["nothing", "products"])
def test_gradients_that_users_take_themselves(tmp_path: Path, remat: str) -> None:
    """The gradients of blocks and of the chunked loss are traced when the model has returned."""

    def in_blocks(layer: Any, path: str) -> Any:
        is_product = isinstance(layer, flm.AttentionDotProduct)
        return flm.AttentionDotProduct(kernel="blockwise") if is_product else layer

    model = LossModel(flm.rewire(_tiny(tmp_path, "float32", "llama_grouped"), in_blocks), 8, remat)
    model.compile("sgd")
    trainable, fixed, metrics = (
        [variable.value for variable in group]
        for group in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        )
    )

    @jax.jit
    def loss(trainable: Any) -> Any:
        return model.compute_loss_and_updates(trainable, fixed, metrics, IDS, IDS, None)[0]

    assert _precisions(jax.grad(loss), trainable) == HIGHEST


@jax.custom_vjp
def _squared(x: jax.Array) -> jax.Array:
    return x @ x


def _squared_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient @ x.T + x.T @ gradient,)


_squared.defvjp(lambda x: (_squared(x), x), _squared_backward)


class _Squares(keras.layers.Layer):
    """Has a gradient of its own, which is traced in the backward pass."""

    def call(self, x: jax.Array) -> jax.Array:
        return jax.vmap(_squared)(x @ jnp.swapaxes(x, 1, 2)) @ x


def test_gradients_that_are_functions(tmp_path: Path) -> None:
    backbone = _tiny(tmp_path, "float32", "llama_grouped")
    norm = next(layer for layer in backbone.layers if layer.name == "final_norm")
    rewired = flm.rewire(backbone, lambda layer, path: _Squares(), where=lambda x, _: x is norm)
    model = LossModel(rewired)
    model.compile("sgd")
    assert _step(model) == HIGHEST


@pytest.mark.parametrize(("dtype", "is_highest"), [("float32", True), ("bfloat16", False)])
def test_prefill_and_decode(tmp_path: Path, dtype: str, is_highest: bool) -> None:
    generator = flm.TextGenerator(_tiny(tmp_path, dtype, "llama_grouped"))
    generator.generate_ids([[1, 2, 3]], max_new_tokens=3)
    programs: list[Any] = [*generator._programs.compiled.values()]
    assert len(programs) == 2
    for program in programs:
        products = re.findall(r".* dot\(.*", program.as_text())
        assert products
        assert all(("{highest,highest}" in x) == is_highest for x in products)
