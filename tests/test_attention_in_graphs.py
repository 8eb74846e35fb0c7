"""Attention in a model's graph: masks that users edit, which kernel runs, and how often.

What the kernels compute: `test_kernels.py`.
"""

import json
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import functional_llm as flm
from benchmarks.gpu_programs import for_h100
from configs import CONFIGS
from functional_llm.kernels import (
    AttentionFacts,
    AttentionKernel,
    Mask,
    Scoring,
    keeps_attended,
    register_attention,
)
from functional_llm.kernels import choice as choice_module
from functional_llm.kernels.blockwise import attend_in_blocks
from functional_llm.kernels.cudnn import attend_causally
from functional_llm.kernels.splash import attend_by_splash
from functional_llm.training import LossModel
from functional_llm.training.rematerialize import rematerialize
from functional_llm.xla.jax_private import PROGRAMS
from reference import save_reference


class _OnlyThePast(flm.AttentionMask):
    """Hides every third slot, in the description that it inherits."""

    def call(self, inputs: Any) -> Any:
        described: Any = super().call(inputs)
        seen = jnp.broadcast_to(described["slot_positions"][:, None] % 3 != 0, (2, 12, 12))
        return {**described, "mask": seen}


class _Everything(flm.AttentionMask):
    """A boolean mask in the place of a description: every token sees every token."""

    def call(self, inputs: Any) -> Any:
        visible: Any = (inputs["slot_positions"] >= 0)[:, None]
        return visible & (inputs["query_positions"] >= 0)[..., None]

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor((None, None, None), "bool")


@pytest.mark.parametrize("kernel", ["explicit", "blockwise"])
@pytest.mark.parametrize("cls", [_OnlyThePast, _Everything])
def test_masks_that_are_rewired_reach_every_kernel(tmp_path: Any, cls: Any, kernel: str) -> None:
    save_reference(CONFIGS["llama_grouped"], tmp_path)
    backbone = flm.Backbone.from_preset(str(tmp_path))
    ids = np.arange(24).reshape(2, 12)

    def replaced(layer: Any, path: str) -> Any:
        if isinstance(layer, flm.AttentionMask):
            return cls(name=layer.name)
        if isinstance(layer, flm.AttentionDotProduct):
            return flm.AttentionDotProduct(kernel=kernel, name=layer.name)
        return layer

    if cls is _Everything:
        mask = np.ones((2, 12, 12), bool)
        explicit = flm.rewire(backbone, lambda x, p: _Fixed(mask) if _is_mask(x) else x)
        expected = explicit(ids)
    else:
        mask = np.broadcast_to(np.arange(12) % 3 != 0, (2, 12, 12))
        expected = backbone({"token_ids": ids, "mask": mask})
    received = flm.rewire(backbone, replaced)(ids)
    seen = 1 if cls is _OnlyThePast else 0  # the first token sees nothing
    np.testing.assert_allclose(received[:, seen:], expected[:, seen:], atol=2e-5)
    assert np.abs(np.asarray(backbone(ids)) - np.asarray(expected))[:, 1:].max() > 1e-3


def _is_mask(layer: Any) -> bool:
    return isinstance(layer, flm.AttentionMask)


class _Fixed(flm.AttentionMask):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.fixed = mask

    def call(self, inputs: Any) -> Any:
        return {"mask": jnp.asarray(self.fixed)}

    def compute_output_spec(self, inputs: Any) -> Any:
        return {"mask": keras.KerasTensor((None, None, None), "bool")}


def test_a_mask_of_an_older_file_is_one_tensor_as_it_was() -> None:
    old = {"name": "full_mask", "window": 3}  # what its config was before masks were described
    layer = flm.AttentionMask.from_config(old)
    positions = np.tile(np.arange(5, dtype="int32"), (2, 1))
    inputs = {"query_positions": positions, "slot_positions": positions, "segment_ids": None}
    mask = np.asarray(layer(inputs))
    np.testing.assert_array_equal(
        mask[0], np.tril(np.ones((5, 5), bool)) & ~np.tri(5, k=-3, dtype=bool)
    )
    new = flm.AttentionMask(window=3)
    again = flm.AttentionMask.from_config(new.get_config())
    assert isinstance(again(inputs), dict) and again.window == 3
    x = np.random.default_rng(0).normal(size=(2, 5, 2, 4)).astype("float32")
    parts = {"query": x, "key": x, "value": x}
    product = flm.AttentionDotProduct()
    np.testing.assert_allclose(
        product({**parts, "mask": mask}), product({**parts, "mask": again(inputs)}), rtol=1e-6
    )


@pytest.mark.parametrize("remat", ["nothing", "layer"])
def test_training_with_blocks_is_training_with_all_scores(tmp_path: Any, remat: str) -> None:
    save_reference(CONFIGS["gemma2_soft_caps"], tmp_path)
    losses = []
    for kernel in ("explicit", "blockwise"):
        backbone = flm.Backbone.from_preset(str(tmp_path))
        backbone = flm.rewire(backbone, partial(_with_kernel, kernel))
        backbone.compile(keras.optimizers.SGD(0.1), remat=remat)
        rows = {
            "token_ids": np.arange(1, 41).reshape(2, 20),
            "segment_ids": np.repeat([[0, 1]], 10, axis=1).repeat(2, axis=0).reshape(2, 20),
            "positions": np.tile(np.arange(10), (2, 2)),
        }
        history = backbone.fit(rows, epochs=3, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert losses[0][0] - losses[0][-1] > 1e-3


def _with_kernel(kernel: str, layer: Any, path: str) -> Any:
    if isinstance(layer, flm.AttentionDotProduct):
        config = {**layer.get_config(), "kernel": kernel}
        return flm.AttentionDotProduct.from_config(config)
    return layer


class _Backwards(flm.KVCacheLookup):
    """Returns the slots in the reverse order."""

    def call(self, inputs: Any) -> Any:
        visible, cache = super().call(inputs)
        return keras.tree.map_structure(lambda x: x[:, ::-1], visible), cache


class _Turned(flm.AttentionMask):
    """Later tokens are seen, and not earlier ones."""

    def call(self, inputs: Any) -> Any:
        turned = {name: -inputs[name] + 12 for name in ("query_positions", "slot_positions")}
        described: Any = super().call({**inputs, **turned})
        return described


def _turn(mask: Any, names: Any = ("query_positions", "slot_positions")) -> Any:
    return {**mask, **{name: -mask[name] + 12 for name in names}}


def _replacing(old: Any, new: Any) -> Any:
    return {"fn": lambda layer, path: new(layer) if isinstance(layer, old) else layer}


def _calling(where: Any, change: Any) -> Any:
    return {"call": lambda layer, path, inputs: layer(change(inputs)), "where": where}


# What a graph is edited by, and whether the tokens are still known to be in order.
EDITS: dict[str, tuple[dict[str, Any], bool]] = {
    "the window": (_replacing(flm.AttentionMask, lambda _: flm.AttentionMask(3)), True),
    "a mask that is called as it was": (_calling(lambda x, p: _is_mask(x), lambda x: x), True),
    "booleans added": (_replacing(flm.AttentionMask, lambda _: _OnlyThePast()), True),
    "positions in the mask": (_replacing(flm.AttentionMask, lambda _: _Turned()), False),
    "positions before the mask": (_calling(lambda x, p: _is_mask(x), _turn), False),
    "positions of the queries": (
        _calling(lambda x, p: _is_mask(x), partial(_turn, names=["query_positions"])),
        False,
    ),
    "positions that are looked up": (
        _calling("full_attention_positions", lambda x: {**x, "new": -x["new"] + 12}),
        False,
    ),
    "slots": (_replacing(flm.KVCacheLookup, lambda x: _Backwards(name=x.name)), False),
    "positions before a layer": (
        _calling("decoder_?", lambda x: {**x, "mask": _turn(x["mask"])}),
        False,
    ),
    "positions before the product": (
        _calling(
            lambda x, p: isinstance(x, flm.AttentionDotProduct),
            lambda x: {**x, "mask": _turn(x["mask"])},
        ),
        False,
    ),
}


@pytest.mark.parametrize(
    ("name", "remat"), [("the window", "nothing"), *((name, "products") for name in EDITS)]
)
def test_tokens_are_in_order_until_positions_are_edited(
    name: str, remat: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that knows by index who sees whom would not see what an edit has moved."""
    save_reference(CONFIGS["llama_grouped"], tmp_path)
    edit, stays = EDITS[name]
    backbone = flm.rewire(flm.Backbone.from_preset(str(tmp_path)), **edit)
    model, ids = rematerialize(backbone, remat), np.arange(24).reshape(2, 12)
    expected = np.asarray(model(ids))
    noted: list[AttentionFacts] = []

    def obstacle(facts: AttentionFacts) -> str | None:
        noted.append(facts)
        return choice_module._of_this_order(facts)

    attend = partial(attend_causally, implementation="xla")
    monkeypatch.setattr(choice_module, "_kernels", list(choice_module._kernels))
    register_attention(AttentionKernel("by_index", obstacle, lambda facts: None, attend))
    seen = slice(1, None) if name == "booleans added" else slice(None)  # the first sees nothing
    np.testing.assert_allclose(np.asarray(model(ids))[:, seen], expected[:, seen], atol=2e-5)
    assert {facts.in_order for facts in noted} == {stays}


def test_positions_that_are_said_to_be_in_order_are(tmp_path: Any) -> None:
    save_reference(CONFIGS["llama_grouped"], tmp_path)
    backbone = flm.Backbone.from_preset(str(tmp_path), load_weights=False)
    inputs = {"token_ids": np.ones((2, 3), "int32"), "in_order": True}
    padded = {**inputs, "positions": np.array([[0, 1, 2], [0, 1, -1]])}
    assert backbone.complete_inputs(padded)["in_order"] is not None
    wrong = (
        {"positions": np.array([[0, 1, 2], [0, 2, 1]])},
        {"attention_mask": [[1] * 3, [0, 1, 1]]},
    )
    for given in wrong:
        with pytest.raises(ValueError, match="in_order is True. Received a row"):
            backbone({**inputs, **{name: np.asarray(x) for name, x in given.items()}})


def _calls(program: Any) -> Any:
    """Yields the name of each operation of a program whose result is used, and its parameters."""
    for equation in getattr(program, "jaxpr", program).eqns:
        inner = [x for x in jax.tree.leaves(equation.params, is_leaf=_is_program) if _is_program(x)]
        if equation.outvars:
            yield equation.primitive.name, equation.params
            for found in inner:
                yield from _calls(found)


def _is_program(x: Any) -> bool:
    return isinstance(x, PROGRAMS)


KEPT_CASES: dict[str, tuple[Any, str, Any]] = {
    "blockwise": (attend_in_blocks, "div", None),  # by the sums, once in each forward pass
    "cudnn": (attend_causally, "dot_product_attention_fwd_wrapper", None),
    "splash": (partial(attend_by_splash, interpret=True), "pallas_call", "fwd"),
}


@pytest.mark.parametrize("name", KEPT_CASES)
def test_kernels_run_once_if_what_they_return_is_kept(name: str) -> None:
    attend, operation, part = KEPT_CASES[name]

    def times(policy: Any) -> int:
        def layer(q: Any, k: Any, v: Any) -> Any:
            positions = jnp.tile(jnp.arange(128, dtype="int32"), (1, 1))
            mask = Mask(positions, positions, in_order=True)
            return jnp.sin(attend(q * 2, k * 2, v * 2, mask, Scoring(0.1)))

        def loss(*arrays: Any) -> Any:
            return jax.checkpoint(layer, policy=policy)(*arrays).astype("float32").sum()

        x = jax.ShapeDtypeStruct((1, 128, 2, 128), "bfloat16")
        with for_h100() if name == "cudnn" else nullcontext():
            program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x)
        found = [params for call, params in _calls(program) if call == operation]
        return sum(part is None or part in str(params["name"]) for params in found)

    assert times(None) == 2
    assert times(keeps_attended) == 1


@pytest.mark.parametrize(("remat", "times"), [("nothing", 1), ("products", 1), ("layer", 2)])
def test_a_training_step_runs_attention(tmp_path: Any, remat: str, times: int) -> None:
    config = {**CONFIGS["llama_grouped"], "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = flm.Backbone.from_preset(tmp_path, dtype="bfloat16", load_weights=False)
    model, ids = LossModel(backbone, 16, remat), np.ones((2, 12), "int32")

    def loss(trainable: Any, fixed: Any) -> Any:
        hidden, _ = model.stateless_call(trainable, fixed, ids)
        return hidden.astype("float32").sum()

    groups = model.trainable_variables, model.non_trainable_variables
    with for_h100():
        program = jax.make_jaxpr(jax.grad(loss))(*([x.value for x in group] for group in groups))
    calls = [name for name, _ in _calls(program) if name.startswith("dot_product_attention")]
    layers = config["num_hidden_layers"]
    assert calls.count("dot_product_attention_fwd_wrapper") == times * layers
    assert calls.count("dot_product_attention_bwd_wrapper") == layers
