"""Equal layers are traced once, and only equal ones: what is edited in one stays in that one."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.generation.equal_layers import trace_equal_layers_once
from functional_llm.generation.programs import CompiledPrograms
from functional_llm.generation.samplers import Greedy
from functional_llm.graph.interchangeable import program_key
from pair import compiled
from tiny import save_tiny


class Louder(keras.layers.Layer):
    """A user's layer, whose config does not say all that it computes."""

    def __init__(self, layer: keras.layers.Layer, times: float) -> None:
        super().__init__(name=layer.name)
        self.layer, self.times, self.built = layer, times, True

    def call(self, x: Any) -> Any:
        return self.layer(x) * self.times

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return flm.Backbone.from_preset(save_tiny(tmp_path_factory.mktemp("tiny")))


def _keys(model: keras.Model) -> list[Any]:
    return [program_key(layer) for layer in model.layers if layer.name.startswith("decoder_")]


def _times(layer: keras.layers.Layer, path: str, x: Any) -> Any:
    return layer(x) * 1.5


EDITS: dict[str, Callable[[Any], Any]] = {
    "a user's layer": lambda model: flm.rewire(
        model, lambda layer, path: Louder(layer, 1.5), where="decoder_1/mlp/up"
    ),
    "a user's layer in each": lambda model: flm.rewire(
        model, lambda layer, path: Louder(layer, 1.0 + ("1/" in path)), where="decoder_*/mlp/up"
    ),
    "a call": lambda model: flm.rewire(model, call=_times, where="decoder_1/mlp/up"),
    "a call in each, with another number": lambda model: flm.rewire(
        model,
        call=lambda layer, path, x: layer(x) * (1.5 if "1/" in path else 0.5),
        where="decoder_*/mlp/up",
    ),
    "int8 in one": lambda model: flm.rewire(
        model,
        lambda layer, path: flm.quantize(model, "int8").get_layer("decoder_1"),
        where="decoder_1",
    ),
    "an attribute": lambda model: _with_epsilon(model),
}


def _with_epsilon(model: Any) -> Any:
    new = flm.rewire(model, lambda layer, path: layer)
    new.get_layer("decoder_1").get_layer("mlp_norm").epsilon = 3.0
    return new


def test_layers_that_differ_in_weights_alone_are_equal(backbone: Any) -> None:
    first, *others = _keys(backbone)
    assert others and all(key == first and hash(key) == hash(first) for key in others)
    first, *others = _keys(flm.peft.lora(backbone, rank=2))
    assert all(key == first for key in others)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_stays_in_its_layer(backbone: Any, name: str) -> None:
    edited = EDITS[name](backbone)
    keys = _keys(edited)
    assert keys[0] != keys[1]
    ids = np.array([[5, 9, 200, 7]], "int32")
    expected = compiled(edited)(ids)
    assert not np.allclose(expected, compiled(backbone)(ids), atol=1e-4)
    received = compiled(trace_equal_layers_once(keras.Model(edited.input, edited.output)))
    full = edited.complete_inputs(ids)
    np.testing.assert_allclose(received(full)["logits"], expected, atol=1e-5)


def test_equal_layers_are_one_function(backbone: Any) -> None:
    model = trace_equal_layers_once(keras.Model(backbone.input, backbone.output))
    inputs = backbone.complete_inputs(np.array([[5, 9]], "int32"))
    traced = jax.jit(lambda: model(inputs, training=False)["logits"]).trace()
    calls = [
        equation.params["jaxpr"]
        for equation in traced.jaxpr.jaxpr.eqns
        if equation.params.get("name") == "CompositeLayer"
    ]
    assert len(calls) == len(_keys(backbone)) and len({id(x) for x in calls}) == 1


def test_the_compiled_program_is_the_same(backbone: Any) -> None:
    """A copy of the cache, say, in each step would be no other result."""
    programs: list[Any] = [CompiledPrograms(backbone) for _ in range(2)]
    kept = {name: backbone.output[name] for name in ("hidden", "cache")}
    programs[1]._trunk = keras.Model(backbone.input, kept)
    stops = np.array([2], "int32")
    texts = [x.decode_shapes(2, 64, Greedy(), stops).compile()().as_text() for x in programs]
    shared, apart = (Counter(re.findall(r"= \S+ ([a-z-]+)\(", text)) for text in texts)
    assert shared["dynamic-update-slice"] and shared == apart


def test_own_call_is_only_its_own(backbone: Any) -> None:
    copy = flm.rewire(backbone, lambda layer, path: layer)
    up = copy.get_layer("decoder_0").get_layer("mlp").get_layer("up")
    up.call = lambda x: x
    assert _keys(copy)[0] != _keys(copy)[1]
