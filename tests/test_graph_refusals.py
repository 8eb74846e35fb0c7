"""What graphs refuse, and how: sizes, what has no graph yet, errors from inside, failed steps."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import InputSpec, layers, ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.equality import same_graph
from functional_llm.graph.keeping_values import KeepsValues
from reference import save_reference

X = np.linspace(-1, 1, 8).reshape(2, 4).astype("float32")
IDS = np.arange(8).reshape(2, 4).astype("int32")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    save_reference(CONFIGS["llama_multi_head_tied"], folder)
    return flm.Backbone.from_preset(folder)


@pytest.fixture
def piece(backbone: Any) -> Any:
    """A model of Keras's own, with weights like the backbone's."""
    again = flm.Backbone.from_preset(backbone.preset)
    return keras.Model(again.input, again.output["logits"])


def functional(layer: Any) -> Any:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer(inputs))


# Sizes -------------------------------------------------------------------------------------------


def mean(x: Any) -> Any:
    return ops.sum(x, axis=1) / x.shape[1]


def test_a_size_that_a_body_may_have_counted_with_is_refused() -> None:
    """As stock Functional models refuse it."""
    ones = np.ones((2, 8, 3), "float32")
    layer = CompositeLayer(mean, name="it")
    np.testing.assert_array_equal(layer(ones[:, :4]), 1)
    message = (
        r"Input of 'it' is incompatible .*expected shape=\(None, 4, 3\), found shape=\(\w+, 8, 3"
    )
    outer = CompositeLayer(lambda x: layer(x) * 1.0)
    for call in (layer, lambda x: layer(keras.Input(x.shape[1:])), outer):
        with pytest.raises(ValueError, match=message):
            call(ones)
    assert layer(np.ones((7, 4, 3))).shape == (7, 3)  # any batch
    assert layer(keras.Input((None, 3))).shape == (None, 3)
    with pytest.raises((TypeError, ValueError)):  # the body itself needs to know
        CompositeLayer(mean)(keras.Input((None, 3)))
    by_shape = CompositeLayer(lambda x: x / x.shape[1])
    by_shape.build((2, 4))  # as another layer builds it, at its first call
    assert by_shape(np.ones((5, 4), "float32")).shape == (5, 4)


def test_a_declared_size_is_free_where_it_is_none() -> None:
    layer = CompositeLayer(lambda x: layers.Dense(2)(x))
    layer.input_spec = InputSpec(shape=(None, None, 3))
    for steps in (4, 8):
        assert layer(np.ones((2, steps, 3), "float32")).shape == (2, steps, 2)
    fixed = CompositeLayer(lambda x: layers.Dense(2)(x))
    fixed.input_spec = InputSpec(shape=(None, 4, 3))
    with pytest.raises(ValueError, match=r"expected shape=\(None, 4, 3\), found shape=\(8, 3, 3\)"):
        fixed(np.zeros((8, 3, 3)))
    assert fixed(np.zeros((8, 4, 3))).shape == (8, 4, 2)
    nested = CompositeLayer(lambda i: i["x"] * ops.sum(i["y"][0], axis=1, keepdims=True))
    nested({"x": X, "y": [X]})
    with pytest.raises(ValueError, match=r"Input 'y.0' .*shape=\(None, 4\), found shape=\(2, 3\)"):
        nested({"x": X, "y": [X[:, :3]]})


def test_input_spec_says_what_was_built() -> None:
    layer: Any = CompositeLayer([layers.Dense(2)])
    before = layer.input_spec
    layer(X)
    assert before is None
    assert layer.input_spec.shape == (None, 4) and layer.input_spec.dtype is None
    nested = CompositeLayer(lambda i: i["x"] + 1.0)
    nested({"x": keras.Input((None, 3), optional=True), "y": [None, X]})
    assert nested.input_spec["x"].optional and nested.input_spec["x"].shape == (None, None, 3)
    assert nested.input_spec["y"][1].shape == (None, 4)
    declared = CompositeLayer([layers.Dense(2, name="d")])
    declared.input_spec = InputSpec(ndim=2, axes={-1: 4})
    model = functional(declared)
    model.input_spec = [InputSpec(min_ndim=2)]
    rewired = flm.rewire(model, lambda layer, path: layers.Dense(3, name="d"))
    assert rewired.layers[-1].input_spec.axes == {-1: 4}
    assert rewired.input_spec[0].min_ndim == 2
    assert flm.rewire(functional(layer)).layers[-1].input_spec.shape == (None, 4)


# No graph yet ------------------------------------------------------------------------------------

ASKS: dict[str, Callable[[Any], Any]] = {
    "rewire": flm.rewire,
    "walk": flm.walk,
    "select": lambda layer: flm.select(layer, "*"),
    "capture": lambda layer: flm.capture(layer, "*"),
    "tree_view": flm.tree_view,
    "plot": lambda layer: flm.plot(layer, "x.dot"),
    "get_layer": lambda layer: layer.get_layer(index=0),
    "unpack_inputs": lambda layer: layer.unpack_inputs(X),
    "compute_output_spec": lambda layer: layer.compute_output_spec(keras.Input((4,))),
    "with_graph": lambda layer: layer.with_graph(functional(layers.Dense(1))),
}


@pytest.mark.parametrize("ask", list(ASKS))
def test_what_has_no_graph_yet_says_so(ask: str) -> None:
    with pytest.raises(ValueError, match="'it' has no graph yet. Expected a built layer: call it"):
        ASKS[ask](CompositeLayer([layers.Dense(4)], name="it"))
    if ask in ("rewire", "walk", "select", "capture", "tree_view", "plot"):
        with pytest.raises(ValueError, match="'it' has no graph yet"):
            ASKS[ask](keras.Sequential([layers.Dense(4)], name="it"))
        with pytest.raises(TypeError, match="no graph to walk through"):
            ASKS[ask](layers.Dense(4))
    ready = CompositeLayer(functional(layers.Dense(4, name="d")))
    assert [path for path, _ in flm.walk(ready)] == ["d"]  # needs no call: it has a graph


def test_bodies_that_take_no_inputs_are_refused_when_made() -> None:
    for body in (lambda: 3, lambda x, y: x, [layers.Dense(4), lambda: 3]):
        with pytest.raises(TypeError, match="with one argument, the inputs.*received"):
            CompositeLayer(body)

    with pytest.raises(TypeError, match="received the class ReLU"):
        CompositeLayer([layers.ReLU])

    class Without(CompositeLayer):
        def functional_build(self) -> Any:  # type: ignore[override]
            return None

    with pytest.raises(TypeError, match=r"functional_build\(\)"):
        Without()
    CompositeLayer(ops.relu)(X)


def test_layers_are_got_by_name_or_index() -> None:
    layer: Any = CompositeLayer([layers.Dense(3, name="a"), layers.Dense(4, name="b")], name="it")
    layer(X)
    assert layer.get_layer(index=1).name == "a" and layer.get_layer(index=-1).name == "b"
    assert layer.get_layer("b") is layer.get_layer(name="b") is layer.get_layer(index=2)
    for arguments in ({}, {"name": "a", "index": 1}):
        with pytest.raises(ValueError, match="Expected a name or an index"):
            layer.get_layer(**arguments)
    for place in (3, "c"):
        with pytest.raises(ValueError, match="No layer .* in 'it'. It has: .*'a', 'b'"):
            layer.get_layer(**{"index" if place == 3 else "name": place})


def test_stock_clone_model_says_that_it_does_not_reach_inside() -> None:
    model = functional(CompositeLayer([layers.Dense(4, name="d")], name="it"))

    def twice(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs)

    def same(layer: Any) -> Any:
        return layer

    clone = keras.models.clone_model
    for arguments in ({"call_function": twice}, {"clone_function": same}):
        with pytest.raises(NotImplementedError, match="not into 'it'.*functional_llm.rewire"):
            clone(model, recursive=True, **arguments)
        assert clone(model, **arguments)(X).shape == (2, 4)
    assert clone(model, recursive=True)(X).shape == (2, 4)


# Rewiring ----------------------------------------------------------------------------------------


def at(where: str, new: Callable[[Any], Any]) -> Any:
    return lambda model: flm.rewire(model, lambda layer, path: new(layer), where=where)


def test_another_width_is_refused_when_rewiring(backbone: Any) -> None:
    query = "decoder_0/attention/query"
    old = flm.select(backbone, query)[query].units
    expected = rf"'{query}' now returns .*\(None, None, 7\).*Expected .*\(None, None, {old}\)"
    for model in (at(query, lambda layer: layers.Dense(7)),):
        with pytest.raises(ValueError, match=f"(?s){expected}.*cannot take that"):
            model(backbone)
    down = "decoder_1/mlp/down"
    with pytest.raises(ValueError, match=f"'{down}' now returns .*1\\).*would broadcast"):
        at(down, lambda layer: layers.Dense(1))(backbone)
    with pytest.raises(ValueError, match="'final_norm' now returns .*bfloat16.*Expected .*float32"):
        at("final_norm", lambda layer: layers.LayerNormalization(dtype="bfloat16"))(backbone)
    wide = flm.rewire(backbone, wider, where=["decoder_1/mlp/*"])  # all that has to do with it
    assert wide(IDS).shape == backbone(IDS).shape


def wider(layer: Any, path: str) -> Any:
    if path.rpartition("/")[2] in ("gate", "up"):
        return layers.Dense(50, use_bias=False, name=layer.name)
    is_down = path.endswith("down")
    return layers.Dense(layer.units, use_bias=False, name="down") if is_down else layer


def test_a_call_that_returns_another_shape_is_refused_too() -> None:
    x = keras.Input((4,))
    y = layers.Dense(6, name="a")(x)
    model = keras.Model(x, layers.Add(name="add")([layers.Dense(6, name="b")(y), y]))
    with pytest.raises(ValueError, match=r"'a' now returns .*\(None, 1\).*Expected .*\(None, 6\)"):
        flm.rewire(model, call=lambda layer, path, x: layer(x)[:, :1], where="a")
    with pytest.raises(ValueError, match="'b' now returns .*'add' cannot take that"):
        flm.rewire(model, lambda layer, path: layers.Dense(3, name="b"), where="b")


class Sub(keras.Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def test_a_subclassed_model_in_a_graph_is_a_leaf() -> None:
    x = keras.Input((4,))
    sub = Sub(name="sub")
    block = CompositeLayer([sub, layers.Dense(4, name="d")], name="block")
    model = keras.Model(x, block(x))
    assert [path for path, _ in flm.walk(model)] == ["block/sub", "block/d"]
    same = flm.rewire(model)
    np.testing.assert_array_equal(same(X), model(X))
    assert same.get_layer("block").get_layer("sub").dense is sub.dense
    doubled = flm.rewire(model, call=lambda layer, path, x: layer(x) * 2.0, where="d")
    np.testing.assert_allclose(doubled(X), 2 * np.array(model(X)), rtol=1e-6)
    assert same_graph(same, model) and flm.capture(model, Sub)(X)["captured"]
    new = copy.deepcopy(block)
    np.testing.assert_array_equal(new(X), block(X))
    assert not {id(v) for v in new.variables} & {id(v) for v in block.variables}
    with pytest.raises(TypeError, match="no graph to walk through"):
        flm.rewire(sub)


# Errors from inside ------------------------------------------------------------------------------


class Fails(layers.Layer):
    """Raises in a call with three rows, in the way it is told to."""

    def __init__(self, error: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = error

    def call(self, x: Any) -> Any:
        if x.shape[0] == 3:
            raise self.error
        return x


def three_deep(layer: Any) -> CompositeLayer:
    inner = CompositeLayer([layers.Dense(4), layer], name="inner")
    middle = CompositeLayer(lambda x: inner(x * 1.0), name="middle")
    outer = CompositeLayer([middle, layers.Dense(2)], name="outer")
    outer.build((None, 4))
    return outer


def notes(error: pytest.ExceptionInfo[Any]) -> str:
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", ())])


@pytest.mark.parametrize("how", ["eager", "model", "predict", "symbolic", "unfiltered"])
@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError])
def test_an_error_from_inside_says_where_once(how: str, kind: type[Exception]) -> None:
    outer = three_deep(Fails(kind("boom"), name="fails"))
    model = functional(outer)
    rows = np.ones((3, 4), "float32")
    calls: dict[str, Callable[[], Any]] = {
        "eager": lambda: outer(rows),
        "unfiltered": lambda: outer(rows),
        "model": lambda: model(rows),
        "predict": lambda: model.predict(rows, verbose=0),
        "symbolic": lambda: outer(keras.Input(batch_shape=(3, 4))),
    }
    if how == "unfiltered":
        keras.config.disable_traceback_filtering()
    try:
        with pytest.raises(kind, match="boom") as error:
            calls[how]()
    finally:
        keras.config.enable_traceback_filtering()
    assert notes(error).count("outer/middle/inner/fails") == 1
    frames = [entry.name for entry in error.traceback]
    assert "call" in frames


def test_an_error_of_a_wrong_input_says_where() -> None:
    """Raised outside of `call`, and raised again by Keras as another object."""
    inner = CompositeLayer([layers.Dense(4, name="dense")], name="inner")
    inner(X)
    outer = CompositeLayer(lambda i: inner(i[0]), name="outer")
    outer([keras.Input((4,), optional=True), X])
    with pytest.raises(ValueError, match="is required") as error:
        outer([None, X])
    assert notes(error).count("outer/inner") == 1

    def wrong(x: Any) -> Any:
        return CompositeLayer([layers.Dense(3), layers.Conv1D(2, 1, name="conv")], name="mid")(x)

    with pytest.raises(ValueError) as error:
        CompositeLayer(wrong, name="outer")(X)
    assert notes(error).count("outer/mid/conv") == 1
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")], name="chain")
    with pytest.raises(ValueError) as error:
        CompositeLayer([model], name="outer")(np.ones((2, 5)))
    assert notes(error).count("outer/chain") == 1


def test_an_error_while_rewiring_says_where() -> None:
    model = functional(three_deep(layers.Dense(4, name="d")))

    def bad(layer: Any, path: str, x: Any) -> Any:
        raise KeyError("boom")

    with pytest.raises(KeyError) as error:
        flm.rewire(model, call=bad, where="d")
    assert notes(error).count("outer/middle/inner/d") == 1


# Failed training ---------------------------------------------------------------------------------


class Keeping(KeepsValues, keras.Model):
    pass


class FailsInStep(layers.Layer):
    def call(self, x: Any) -> Any:
        if x.shape[0] == 3:
            raise RuntimeError("boom")
        return x


class Raises(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise RuntimeError("boom")

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


@pytest.mark.parametrize("what", ["predict", "evaluate", "fit"])
@pytest.mark.parametrize("when", ["first step", "last step", "callback", "data"])
def test_weights_outlive_a_failure(what: str, when: str) -> None:
    x = keras.Input((4,))
    block = CompositeLayer([layers.Dense(4), FailsInStep(), layers.BatchNormalization()])
    model = Keeping(x, block(x))
    model.compile("adam", "mse")
    model.fit(X, X, verbose=0)
    before = [np.array(v) for v in model.variables]
    rows = np.ones((3 if when == "first step" else 7, 4), "float32")
    rows = rows[:4] if when in ("callback", "data") else rows

    def broken() -> Any:
        for _ in range(2):
            yield (rows, rows)
        raise RuntimeError("boom")

    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            if index == 2:
                raise RuntimeError("boom")
            return rows, rows

    given = {"callbacks": [Raises()]} if when == "callback" else {}
    with pytest.raises(RuntimeError, match="boom"):
        if when == "data":
            getattr(model, what)(Data(), verbose=0)
        elif what == "predict":
            model.predict(rows, batch_size=4, verbose=0, **given)
        else:
            getattr(model, what)(rows, rows, batch_size=4, verbose=0, **given)
    after = [np.array(v) for v in model.variables]
    for old, new in zip(before, after, strict=True):
        assert np.isfinite(new).all()
        if what != "fit" or when == "first step":
            np.testing.assert_array_equal(new, old)
    model.fit(X, X, verbose=0)  # the optimizer is whole, too
    assert np.isfinite(model.predict(X, verbose=0)).all()


FAILURES = (RuntimeError, ValueError)  # which of them, only JAX knows


class FailsWhenItRuns(layers.Layer):
    is_broken = False

    def call(self, x: Any) -> Any:
        def check(value: Any) -> Any:
            if FailsWhenItRuns.is_broken:
                raise RuntimeError("boom")
            return value

        first = jax.lax.stop_gradient(x[:1, :1])
        return x + 0 * jax.pure_callback(check, jax.typeof(first), first, vmap_method="sequential")


@pytest.fixture
def fails_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    x = keras.Input((4,))
    frozen = layers.Dense(4, trainable=False)
    model = Keeping(x, layers.Dense(4)(FailsWhenItRuns()(frozen(x))))
    model.compile("adam", "mse")
    model.fit(X, X, verbose=0)
    logging.disable()  # JAX logs what a callback raises
    yield model
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("what", ["predict", "evaluate", "predict_on_batch", "test_on_batch"])
def test_weights_outlive_a_step_that_fails_while_it_runs(
    what: str, fails_when_it_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fails_when_it_runs
    before = [np.array(v) for v in model.variables]
    given = [X] if "predict" in what else [X, X]
    with monkeypatch.context() as patch, pytest.raises(FAILURES, match="boom"):
        patch.setattr(FailsWhenItRuns, "is_broken", True)
        getattr(model, what)(*given, **({} if "batch" in what else {"verbose": 0}))
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(variable, old)
    model.fit(X, X, verbose=0)


@pytest.mark.parametrize("what", ["fit", "train_on_batch"])
def test_what_trains_is_lost_with_such_a_step_and_says_so(
    what: str, fails_when_it_runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = fails_when_it_runs
    model.save_weights(tmp_path / "x.weights.h5")
    expected = model.predict(X, verbose=0)
    with monkeypatch.context() as patch, pytest.raises(FAILURES, match="boom") as error:
        patch.setattr(FailsWhenItRuns, "is_broken", True)
        getattr(model, what)(X, X)
    assert "dense" in notes(error) and "Load them again" in notes(error)
    trained, frozen = model.layers[3].kernel, model.layers[1].kernel
    with pytest.raises(RuntimeError, match="of shape .4, 4. has no value.*Load the model again"):
        np.array(trained)
    assert np.isfinite(np.array(frozen)).all()
    model.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(model.predict(X, verbose=0), expected)
    model.compile("adam", "mse")
    model.fit(X, X, verbose=0)


def test_a_backbone_outlives_a_failure(backbone: Any) -> None:
    expected = np.array(backbone(IDS))
    with pytest.raises(RuntimeError, match="boom"):
        backbone.predict(IDS, batch_size=1, verbose=0, callbacks=[Raises()])
    np.testing.assert_array_equal(backbone(IDS), expected)


def test_other_models_are_never_random(piece: Any) -> None:
    inputs = keras.tree.map_structure(lambda _: None, piece.input)
    inputs |= {"token_ids": IDS, "positions": np.arange(4)[None] + 0 * IDS}
    expected = np.array(piece(inputs))
    assert np.isfinite(expected).all()
    for variable in piece.variables:
        variable._value = None  # as a failed `predict` of Keras leaves them
    with pytest.raises(
        RuntimeError, match="has no value.*a step of `fit` failed.*Load the model again"
    ):
        piece(inputs)


def test_a_weight_without_a_value_is_never_random() -> None:
    from functional_llm.graph.keras_values import uninitialized

    layer = layers.Dense(3)
    with uninitialized():
        layer.build((None, 4))
    assert layer(keras.Input((4,))).shape == (None, 3)
    with pytest.raises(RuntimeError, match="has no value: it was not loaded yet, or its value was"):
        layer(X)


# Other backends ----------------------------------------------------------------------------------


def test_what_needs_jax_says_so(repository: Path) -> None:
    pytest.importorskip("torch")
    script = """
import copy, keras, numpy as np
import functional_llm as flm
from keras import layers
block = flm.CompositeLayer([layers.Dense(8, name="query"), layers.Dense(4, name="value")])
inputs = keras.Input((4,))
class Model(flm.Freezable, keras.Model):
    pass


model = Model(inputs, block(inputs))
preset = "smollm2_135m_instruct"
for do in (
    lambda: flm.quantize(model),
    lambda: flm.TextGenerator(model),
    lambda: flm.Backbone.from_preset(preset, load_weights=False),
    lambda: flm.Backbone.from_preset(preset),
):
    try:
        do()
    except RuntimeError as error:
        assert "needs JAX: set KERAS_BACKEND=jax before Keras is imported" in str(error), error
        assert "\\n" not in str(error)
    else:
        raise AssertionError(do)
X = np.ones((2, 4), "float32")
double = flm.rewire(model, call=lambda layer, path, x: layer(x) * 2.0, where="value")
array = keras.ops.convert_to_numpy
np.testing.assert_allclose(array(double(X)), 2 * array(model(X)), rtol=1e-5)
np.testing.assert_allclose(array(copy.deepcopy(block)(X)), array(block(X)), rtol=1e-5)
assert flm.capture(model, "query")(X)["captured"] and flm.tree_view(model)
adapted = flm.peft.lora(model, rank=2)
np.testing.assert_allclose(array(flm.peft.merge(adapted)(X)), array(model(X)), rtol=1e-5)
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
