"""Composites with state of their own: copies, clones, files, before and after a rewiring."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.own_weights import OwnWeight
from functional_llm.stock.lowering import Lowering
from reference import save_reference

# Keras 3.15 with NumPy 2, saving any model: not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

X = np.linspace(-1, 1, 8).reshape(2, 4).astype("float32")
register = keras.saving.register_keras_serializable("test_composite_state")


@register
class Noise(layers.Layer):
    """Adds random numbers, of a generator that it is given."""

    def __init__(self, generator: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(3) if generator is None else generator

    def call(self, x: Any) -> Any:
        return x + keras.random.normal((4,), seed=self.generator)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


@register
class Stateful(CompositeLayer):
    """State of every kind, some of it made in the constructor and some in `functional_build`."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.scale = self.add_weight(shape=(4,), initializer="ones", name="scale")
        self.generator = keras.random.SeedGenerator(1)
        self.noise = Noise(self.generator, name="noise")
        self.spare = layers.Dense(2, name="spare")  # not in the graph
        self.spare.build((None, 4))
        self.blocks = [layers.Dense(units, name="block_0")]
        self.by_name: dict[str, Any] = {}
        self.down: Any = None

    def functional_build(self, inputs: Any) -> Any:
        self.down = layers.Dense(4, name="down")  # sorts before "graph"
        self.up = layers.Dense(self.units, name="up")
        self.shift = self.add_weight(shape=(4,), name="shift")
        self.blocks.append(layers.Dense(4, name="block_1"))
        self.by_name["last"] = layers.Dense(4, name="last")
        self.sizes = ("in", inputs.shape[-1], {"units": [self.units]})
        x = self.down(self.up(self.noise(inputs) * self.scale)) + self.shift
        for block in (*self.blocks, self.by_name["last"]):
            x = block(x)
        return x


def functional(layer: Any) -> Any:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer(inputs))


def replace(layer: Any, path: str) -> Any:
    return layers.Dense(4, name="up", kernel_initializer="ones") if path.endswith("up") else layer


def make(kind: str) -> Any:
    keras.utils.set_random_seed(1)
    layer = Stateful(name="it")
    layer(X)
    layer.scale.assign([1.0, 2.0, 3.0, 4.0])
    layer.spare.kernel.assign(ops.ones((4, 2)) * 7.0)
    if kind == "rewired":
        layer = flm.rewire(layer, replace)
    if kind == "rewired twice":
        layer = flm.rewire(flm.rewire(layer, replace), lambda x, path: x)
    return layer


KINDS = ["as built", "rewired", "rewired twice"]


def check(layer: Any, new: Any) -> None:
    """The same numbers, every attribute in its place, and nothing shared."""
    assert type(new) is type(layer) and new.name == layer.name
    assert [w.path for w in new.weights] == [w.path for w in layer.weights]
    old_state = {id(v) for v in layer.variables} | {id(x) for x in layer._flatten_layers()}
    assert not old_state & {id(v) for v in (*new.variables, *new._flatten_layers())}
    for name in ("down", "up", "noise"):
        assert getattr(new, name) is new.get_layer(name)
    assert [x is new.get_layer(f"block_{i}") for i, x in enumerate(new.blocks)] == [True] * 2
    assert new.by_name["last"] is new.get_layer("last")
    assert new.sizes == ("in", 4, {"units": [4]})
    assert new.units == 4 and type(new.generator) is keras.random.SeedGenerator
    for own, other in ((layer, new), (new, layer)):
        before = value(other)
        np.testing.assert_allclose(value(own), before, rtol=1e-6)
        own.scale.assign(own.scale * 2.0)
        own.shift.assign(own.shift + 1.0)
        np.testing.assert_array_equal(value(other), before)
        assert np.abs(value(own) - before).max() > 1e-3
        own.scale.assign(own.scale / 2.0)
        own.shift.assign(own.shift - 1.0)


def value(layer: Any) -> np.ndarray:
    layer.noise.generator.state.assign([1, 0])
    return np.array(layer(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_has_a_state_of_its_own(kind: str) -> None:
    layer = make(kind)
    new = copy.deepcopy(layer)
    assert new.noise.generator is new.generator and new.generator is not layer.generator
    np.testing.assert_array_equal(new.spare.kernel, layer.spare.kernel)
    check(layer, new)
    check(new, copy.deepcopy(new))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["file", "pickle", "pickled layer", "clone", "config", "weights"])
def test_a_file_and_a_clone_have_it_too(kind: str, how: str, tmp_path: Path) -> None:
    layer = make(kind)
    model = functional(layer)
    if how == "file":
        model.save(tmp_path / "m.keras")
        new = keras.saving.load_model(tmp_path / "m.keras").layers[-1]
    elif how == "pickle":
        new = pickle.loads(pickle.dumps(model)).layers[-1]
    elif how == "pickled layer":
        new = pickle.loads(pickle.dumps(layer))
    else:
        if how == "clone":
            new = keras.models.clone_model(model).layers[-1]
        else:
            new = type(layer).from_config(layer.get_config())
            new(X)
        if how == "weights":
            model.save_weights(tmp_path / "m.weights.h5")
            functional(new).load_weights(tmp_path / "m.weights.h5")
        else:
            new.set_weights(layer.get_weights())
    check(layer, new)
    if how in ("file", "clone"):
        again = flm.rewire(new, lambda x, path: x)
        functional(again).save(tmp_path / "again.keras")
        check(again, keras.saving.load_model(tmp_path / "again.keras").layers[-1])


def test_copies_before_the_first_call_share_nothing() -> None:
    shared = layers.Dense(4)
    weight = keras.Variable(np.ones((4,), "float32"), name="w")

    def by_default(x: Any, layer: Any = shared) -> Any:
        return layer(x)

    bodies = [
        lambda x: shared(x) * weight,
        by_default,
        functools.partial(lambda layer, x: layer(x), shared),
        lambda x: [shared, *[by_default]][1](x),
        [shared, CompositeLayer(lambda x: shared(x))],
    ]
    for body in bodies:
        layer = CompositeLayer(body)
        new = copy.deepcopy(layer)
        assert new(X).shape == layer(X).shape == (2, 4)
        assert not {id(v) for v in new.variables} & {id(v) for v in layer.variables}
    before = copy.deepcopy(Stateful())
    assert before.noise.generator is before.generator and before(X).shape == (2, 4)
    assert before.up is before.get_layer("up")


def test_weights_used_by_a_body_train_and_are_saved(tmp_path: Path) -> None:
    """Nobody has them as an attribute; they are found in the graph."""
    weight = keras.Variable(np.ones((4,), "float32"), name="w")
    inner = CompositeLayer(lambda x: x * weight + weight, name="inner")
    model = functional(CompositeLayer(lambda x: inner(x) * 1.0, name="outer"))
    assert model.trainable_weights == [weight]
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    assert np.abs(np.array(weight) - 1).max() > 0
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert [v.path for v in loaded.weights] == ["outer/inner/w"]
    assert isinstance(loaded.layers[-1].get_layer("inner").get_layer("w"), OwnWeight)


@register
class Tied(CompositeLayer):
    """Uses the weight of one of its layers once more."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, use_bias=False, name="dense")

    def functional_build(self, inputs: Any) -> Any:
        return ops.matmul(self.dense(inputs), self.dense.kernel)


def test_a_tie_stays_in_copies_and_a_file_that_cannot_hold_it_says_so(tmp_path: Path) -> None:
    layer = Tied()
    model = functional(layer)
    assert len(model.weights) == 1
    new = copy.deepcopy(layer)
    new.dense.kernel.assign(ops.ones((4, 4)))
    np.testing.assert_allclose(new(X), X @ np.ones((4, 4)) @ np.ones((4, 4)), rtol=1e-6)
    model.save(tmp_path / "m.keras")  # `functional_build` makes the tie again
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(loaded.weights) == 1
    np.testing.assert_array_equal(loaded(X), model(X))
    with pytest.raises(NotImplementedError, match="'kernel' of its layer 'dense' outside"):
        flm.rewire(layer, lambda x, path: x).get_config()


@register
class Keeps(CompositeLayer):
    """Sets on itself, in `functional_build`, what no file can hold."""

    def functional_build(self, inputs: Any) -> Any:
        self.hidden = inputs + 1.0
        return self.hidden * 2.0


def test_what_a_file_cannot_hold_is_said() -> None:
    layer = Keeps(name="it")
    functional(layer)
    assert "body" not in layer.get_config()
    message = "'it' was rewired.*`functional_build` has set `hidden`.*KerasTensor.*constructor"
    with pytest.raises(NotImplementedError, match=message):
        flm.rewire(layer, lambda x, path: x).get_config()


@register
class ByArguments(CompositeLayer):
    """Has a `from_config` and a `get_config` as many layers have them."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units

    def functional_build(self, inputs: Any) -> Any:
        return layers.Dense(self.units, name="d")(inputs)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "units": self.units}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


@register
class ByArgumentsOfOld(ByArguments):
    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        config = dict(config)
        config["units"] = config.pop("width", config.get("units"))
        return super().from_config(config)


@register
class GivenBody(CompositeLayer):
    def __init__(self, factor: float, body: Any, **kwargs: Any) -> None:
        super().__init__(body, **kwargs)
        self.factor = factor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


@pytest.mark.parametrize("cls", [ByArguments, ByArgumentsOfOld])
@pytest.mark.parametrize("how", ["rewired", "declared", "both"])
def test_a_class_with_a_plain_from_config_loads(cls: Any, how: str, tmp_path: Path) -> None:
    layer = cls(3, name="it")
    if how != "rewired":
        layer.input_spec = keras.InputSpec(shape=(None, 4), optional=True)
    layer(X)
    if how != "declared":
        layer = flm.rewire(layer, call=lambda layer, path, x: layer(x) * 2.0)
    model = functional(layer)
    model.save(tmp_path / "m.keras")
    for other in (keras.saving.load_model(tmp_path / "m.keras"), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other(X), model(X))
        new = other.layers[-1]
        assert type(new) is cls and new.units == 3
        assert how == "rewired" or new.input_spec.optional
    assert keras.models.clone_model(model)(X).shape == (2, 3)


class PlainConfig:
    """A mixin that knows nothing of bodies."""

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


@register
class Mixed(PlainConfig, CompositeLayer):
    def functional_build(self, inputs: Any) -> Any:
        return layers.Dense(4, name="d")(inputs)


def test_a_mixin_with_a_config_keeps_the_body_too(tmp_path: Path) -> None:
    layer = Mixed(name="it")
    layer(X)
    assert layer.get_config() == {"name": "it"}
    model = functional(flm.rewire(layer, call=lambda layer, path, x: layer(x) * 2.0))
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "m.keras")(X), model(X))


def test_a_body_given_to_a_plain_from_config(tmp_path: Path) -> None:
    model = functional(GivenBody(2.5, [layers.Dense(4)]))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded.layers[-1].factor == 2.5
    unbuilt = GivenBody(1.5, [layers.Dense(3)])
    assert GivenBody.from_config(unbuilt.get_config())(X).shape == (2, 3)


def test_stock_files_hold_weights_of_bodies(tmp_path: Path) -> None:
    save_reference(CONFIGS["llama_multi_head_tied"], tmp_path)
    backbone = flm.Backbone.from_preset(tmp_path)
    weight = keras.Variable(np.full((1,), 2.0, "float32"), name="factor")

    def scaled(layer: Any, path: str) -> Any:
        return CompositeLayer(lambda x: layer(x) * weight, name=layer.name)

    model = flm.rewire(backbone, scaled, where="decoder_0/mlp/down")
    ids = np.arange(8).reshape(2, 4).astype("int32")
    stock = Lowering(model).model
    np.testing.assert_allclose(stock(ids), model(ids), atol=1e-5)
    assert np.abs(np.array(model(ids)) - np.array(backbone(ids))).max() > 1e-3
    config = stock.to_json()
    assert "OwnWeight" not in config and "functional_llm" not in config
    assert any("factor" in variable.path for variable in stock.trainable_weights)


# Depth -------------------------------------------------------------------------------------------


@register
class Nest(CompositeLayer):
    """Holds the next one as an attribute too, as a class of layers does."""

    def __init__(self, depth: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth
        self.inner: Any = Nest(depth - 1, name="inner") if depth else layers.Dense(4, name="inner")

    def functional_build(self, inputs: Any) -> Any:
        return self.inner(inputs) * 1.0


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns how often methods of composites, and of all layers, run in a call."""
    calls = [0]

    def counted(owner: Any, name: str) -> None:
        method = getattr(owner, name)
        if isinstance(method, property):
            getter = method.fget

            def get(self: Any) -> Any:
                calls[0] += 1
                return getter(self)  # type: ignore[misc]

            monkeypatch.setattr(owner, name, property(get, method.fset))
            return

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    def measure(do: Any) -> int:
        calls[0] = 0
        do()
        return calls[0]

    for name in ("call", "get_config", "_attributes", "build", "compute_output_spec"):
        counted(CompositeLayer, name)
    for name in ("get_config", "call", "build"):
        counted(layers.Dense, name)
    counted(layers.Layer, "metrics")
    counted(keras.Model, "get_config")
    return measure


def test_time_is_linear_in_depth(count: Any, tmp_path: Path) -> None:
    def run(depth: int) -> dict[str, int]:
        model = functional(Nest(depth, name="outer"))
        path = tmp_path / f"{depth}.keras"
        rewired = flm.rewire(model, replace_inner)
        counts = {
            "metrics": count(lambda: model.metrics),
            "weights": count(lambda: model.weights),
            "save": count(lambda: rewired.save(path)),
            "load": count(lambda: keras.saving.load_model(path)),
            "copy": count(lambda: copy.deepcopy(model.layers[-1])),
            "rewire": count(lambda: flm.rewire(model, replace_inner)),
            "config": count(lambda: model.layers[-1].get_config()),
            "trainable": count(lambda: setattr(model, "trainable", False)),
        }
        model.compile("sgd", "mse", run_eagerly=True)
        counts["fit"] = count(lambda: model.fit(X, X, verbose=0))
        return counts

    shallow, deep = run(4), run(16)
    for name, number in deep.items():
        assert number <= 4.5 * shallow[name] + 4, (name, shallow[name], number)


def replace_inner(layer: Any, path: str) -> Any:
    return layers.Dense(4, name=layer.name)


def test_layers_are_found_once_at_any_depth() -> None:
    model = functional(Nest(20, name="outer"))
    found = [x for x in model._flatten_layers() if isinstance(x, (Nest, layers.Dense))]
    assert len(found) == 22 == len({id(x) for x in found}) and len(model.weights) == 2


class _BuildsWeights(CompositeLayer):
    """Makes its weight in `build`, which is Keras's natural place."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape: Any) -> None:
        self.scale = self.add_weight(shape=(self.units,), initializer="ones", name="scale")
        super().build(input_shape)

    def functional_build(self, inputs: Any) -> Any:
        self.up = layers.Dense(self.units, name="up")
        return self.up(inputs) * self.scale


def test_weights_made_in_build_are_made_once() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, _BuildsWeights(name="c")(x))
    rewired = flm.rewire(model, lambda layer, path: layer)
    names = ["c/scale", "c/up/bias", "c/up/kernel"]
    assert sorted(w.path for w in rewired.weights) == names
    assert {id(w) for w in rewired.weights} == {id(w) for w in model.weights}


def test_an_attribute_is_what_replaced_it_under_another_name() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, _BuildsWeights(name="c")(x))
    new = layers.Dense(4)
    rewired = flm.rewire(model, lambda layer, path: new if path.endswith("/up") else layer)
    assert rewired.get_layer("c").up is new
