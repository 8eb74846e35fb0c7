"""CompositeLayer: bodies, nesting, saving, copying, masks, dtypes."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers, ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.composite_copying import clone_graph

# Keras 3.15 with NumPy 2, saving any model: not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

X = np.linspace(-1, 1, 8).reshape(2, 4).astype("float32")
register = keras.saving.register_keras_serializable("test_composite")


def mlp(x: Any) -> Any:
    return layers.Dense(4)(layers.Dense(3, activation="relu")(x)) + x


@register
class ByMethod(CompositeLayer):
    """Graph made inside, by `functional_build`; arguments recorded by Keras."""

    def __init__(self, units: int, use_bias: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.use_bias = use_bias

    def functional_build(self, inputs: Any) -> Any:
        return layers.Dense(self.units, use_bias=self.use_bias)(inputs)


@register
class WithParts(CompositeLayer):
    """Makes sub-layers in the constructor and uses them in `functional_build`."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, name="first")
        self.blocks = [layers.Dense(units), ByMethod(units, use_bias=False)]

    def functional_build(self, inputs: Any) -> Any:
        x = self.first(inputs)
        for block in self.blocks:
            x = block(x)
        return x


@register
class ByFunctionInside(CompositeLayer):
    """Passes a function to the base class."""

    def __init__(self, units: int = 4, **kwargs: Any) -> None:
        super().__init__(lambda x: layers.Dense(units)(x) * 2.0, **kwargs)
        self.units = units


@register
class ByListInside(CompositeLayer):
    """Passes a list to the base class, and keeps one of the layers."""

    def __init__(self, layers: int = 2, **kwargs: Any) -> None:  # the name of a config key
        self_head = keras.layers.Dense(4, name="head")
        super().__init__([*[keras.layers.Dense(4) for _ in range(layers)], self_head], **kwargs)
        self.head = self_head


@register
class FromOutside(CompositeLayer):
    """Is given its graph, with an argument of its own."""

    def __init__(self, scale: float, fn: Any, **kwargs: Any) -> None:
        super().__init__(fn, **kwargs)
        self.scale = scale

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale}


@register
class Plain(CompositeLayer):
    """A subclass without a constructor."""


def ready_model() -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, mlp(inputs))


MAKERS = {
    "function": lambda: CompositeLayer(mlp),
    "list": lambda: CompositeLayer([layers.Dense(3), layers.Dense(4)]),
    "model": lambda: CompositeLayer(ready_model()),
    "sequential": lambda: CompositeLayer(keras.Sequential([keras.Input((4,)), layers.Dense(4)])),
    "method": lambda: ByMethod(4, use_bias=False),
    "parts": lambda: WithParts(4),
    "function inside": lambda: ByFunctionInside(4),
    "list inside": lambda: ByListInside(3),
    "outside": lambda: FromOutside(2.5, mlp),
    "plain subclass": lambda: Plain(mlp),
    "nested": lambda: CompositeLayer(
        lambda x: WithParts(4)(FromOutside(1.5, [Plain(mlp), ByMethod(4)])(x)) + x
    ),
}


@pytest.fixture(params=list(MAKERS))
def layer(request: pytest.FixtureRequest) -> CompositeLayer:
    keras.utils.set_random_seed(0)
    made: CompositeLayer = MAKERS[request.param]()
    return made


def functional(layer: Any) -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer(inputs))


def sequential(layer: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layer])


def check_same(old: CompositeLayer, new: Any) -> None:
    assert type(new) is type(old) and new.name == old.name
    for key in ("units", "use_bias", "scale"):
        assert getattr(new, key, None) == getattr(old, key, None)
    assert [w.shape for w in new.weights] == [w.shape for w in old.weights]
    for key in ("first", "head"):
        if hasattr(old, key):
            assert getattr(new, key) in new.layers and getattr(new, key) is not getattr(old, key)
    if isinstance(old, WithParts):
        assert [type(x) for x in new.blocks] == [type(x) for x in old.blocks]
        assert all(x in new.layers for x in new.blocks)


# Making and building ------------------------------------------------------------------------


def test_nothing_is_built_before_the_first_call(layer: CompositeLayer):
    assert not layer.built and layer.graph is None and layer.layers == []
    assert layer(X).shape == (2, 4)
    assert layer.built and layer.weights and layer.layers
    assert layer(keras.Input((4,))).shape == (None, 4)


def test_build_by_hand(layer: CompositeLayer):
    layer.build((None, 4))
    weights = layer.weights
    assert weights and layer(X).shape == (2, 4)
    layer.build((None, 4))
    assert [id(w) for w in layer.weights] == [id(w) for w in weights]
    assert layer.compute_output_shape((7, 4)) == (7, 4)


def test_compute_output_shape_builds_as_wrappers_need_it():
    wrapped = layers.TimeDistributed(CompositeLayer([layers.Dense(3)]))
    assert wrapped(np.ones((2, 5, 4), "float32")).shape == (2, 5, 3)
    tokens = CompositeLayer([layers.Embedding(9, 3)])
    assert tokens.compute_output_shape((2, 5)) == (2, 5, 3)


@pytest.mark.parametrize("body", [3, [], [3], layers.Dense(2), keras.Sequential(), "abc"])
def test_bodies_that_are_none(body: Any):
    with pytest.raises(TypeError, match="expects a function, a non-empty list of layers or"):
        CompositeLayer(body)


def test_bodies_that_fail():
    with pytest.raises(NotImplementedError, match="has no body. Expected a function"):
        CompositeLayer()(X)
    with pytest.raises(ValueError, match="returned None at 'y.0'. Expected symbolic"):
        CompositeLayer(lambda x: {"y": [None]})(X)
    with pytest.raises(ValueError, match="returned 3. Expected symbolic"):
        CompositeLayer(lambda x: 3)(X)
    outer = keras.Input((4,))
    with pytest.raises(
        ValueError, match=r"body of 'it' gave no graph.*is not connected.*as inputs"
    ):
        CompositeLayer(lambda x: x + outer, name="it")(X)
    with pytest.raises(ValueError, match='gave no graph.*"same".*different names'):
        CompositeLayer([layers.Dense(4, name="same"), layers.Dense(4, name="same")], name="it")(X)
    with pytest.raises(ValueError, match="no graph yet"):
        CompositeLayer(mlp).with_graph(ready_model())


def test_names_are_unique_and_paths_nest(tmp_path: Path):
    first, second = CompositeLayer(mlp), CompositeLayer(mlp)
    assert first.name != second.name
    inner = CompositeLayer([layers.Dense(4, name="dense_in")], name="inner")
    outer = CompositeLayer([CompositeLayer([inner], name="mid")], name="outer")
    model = functional(outer)
    expected = ["outer/mid/inner/dense_in/kernel", "outer/mid/inner/dense_in/bias"]
    assert [w.path for w in outer.weights] == expected
    model.save(tmp_path / "m.keras")
    for new in (
        keras.saving.load_model(tmp_path / "m.keras"),
        keras.models.clone_model(model),
        copy.deepcopy(outer),
        functional(outer.with_graph(outer.graph)),
    ):
        assert [w.path for w in new.weights] == expected
        assert outer.layers[-1].path == "outer/mid"


# Saving, loading, cloning, copying ----------------------------------------------------------


@pytest.mark.parametrize("wrap", [functional, sequential])
def test_save_and_load(layer: CompositeLayer, wrap: Any, tmp_path: Path):
    model = wrap(layer)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    check_same(layer, loaded.layers[-1])
    loaded.save(tmp_path / "again.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "again.keras")(X), model(X))
    model.save_weights(tmp_path / "m.weights.h5")
    fresh = keras.models.clone_model(model)
    fresh.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(fresh(X), model(X))


@pytest.mark.parametrize("wrap", [functional, sequential])
def test_clone_model(layer: CompositeLayer, wrap: Any):
    model = wrap(layer)
    clone = keras.models.clone_model(model)
    check_same(layer, clone.layers[-1])
    assert not {id(w) for w in clone.weights} & {id(w) for w in model.weights}
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(X), model(X))


def test_get_config_and_from_config(layer: CompositeLayer):
    layer(X)
    new = type(layer).from_config(layer.get_config())
    new(X)
    check_same(layer, new)
    new.set_weights(layer.get_weights())
    np.testing.assert_array_equal(new(X), layer(X))


def test_deep_copy(layer: CompositeLayer):
    layer(X)
    new = copy.deepcopy(layer)
    check_same(layer, new)
    before = np.array(layer(X))
    np.testing.assert_array_equal(new(X), before)
    new.weights[0].assign(new.weights[0] + 1.0)
    np.testing.assert_array_equal(layer(X), before)
    assert np.abs(new(X) - before).max() > 0
    model = functional(layer)
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)  # donates the arrays of `layer`
    new(X)


def test_deep_copy_keeps_attributes_and_sharing():
    shared = layers.Dense(4)
    inner = CompositeLayer(lambda x: shared(x) * 2.0)
    outer = Plain(lambda x: shared(inner(shared(x))))
    outer.notes, outer.favourites = {"lines": [1, 2]}, [shared, {"inner": inner}]
    outer(X)
    new = copy.deepcopy(outer)
    np.testing.assert_array_equal(new(X), outer(X))
    assert len(new.weights) == 2
    assert new.notes == {"lines": [1, 2]} and new.notes is not outer.notes
    assert new.favourites[0] in new.layers and new.favourites[1]["inner"] in new.layers
    both = copy.deepcopy([outer, outer])
    assert both[0] is both[1]


class ByItsMethod(CompositeLayer):
    """Gives one of its methods as the body."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(self.make, **kwargs)
        self.units = units

    def make(self, x: Any) -> Any:
        return layers.Dense(self.units)(x)


def test_deep_copy_of_a_body_that_is_a_method():
    layer = ByItsMethod(3)
    new = copy.deepcopy(layer)
    new.units = 5
    assert new(X).shape == (2, 5) and layer(X).shape == (2, 3)


@pytest.mark.parametrize("name", ["function", "list", "model", "parts", "outside"])
def test_deep_copy_before_the_first_call(name: str):
    layer = MAKERS[name]()
    new = copy.deepcopy(layer)
    assert type(new) is type(layer) and new(X).shape == (2, 4)
    assert not layer.built or name == "model"
    layer(X)
    assert not {id(w) for w in new.weights} & {id(w) for w in layer.weights}


def test_unregistered_classes_are_copied():
    class Here(CompositeLayer):
        def functional_build(self, inputs: Any) -> Any:
            return Custom()(keras.Sequential([keras.Input((4,)), Custom()])(inputs))

    class Custom(layers.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(4,), initializer="random_normal")

        def call(self, x: Any) -> Any:
            return x * self.w

    layer = CompositeLayer([Here(), layers.Dropout(0.5, seed=1)])
    np.testing.assert_array_equal(copy.deepcopy(layer)(X).shape, layer(X).shape)
    np.testing.assert_array_equal(copy.deepcopy(layer)(X), layer(X))
    first, second = copy.deepcopy(layer), copy.deepcopy(layer)
    np.testing.assert_array_equal(first(X, training=True), second(X, training=True))


def test_unbuilt_bodies():
    chain = CompositeLayer([layers.Dense(3), CompositeLayer([layers.Dense(2)])], name="chain")
    new = CompositeLayer.from_config(chain.get_config())
    assert not new.built and new(X).shape == (2, 2) and new.name == "chain"
    with pytest.raises(ValueError, match="Python function and has not been called yet.*Call it"):
        CompositeLayer(mlp).get_config()
    assert "graph" in CompositeLayer(ready_model()).get_config()["body"]


def test_arguments_that_keras_cannot_record_are_not_lost():
    class Scaled(CompositeLayer):
        def __init__(self, fn: Any, scale: float = 1.0, **kwargs: Any) -> None:
            super().__init__(fn, **kwargs)

    class Built(CompositeLayer):
        def __init__(self, initializer: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)

        def functional_build(self, inputs: Any) -> Any:
            return inputs * 2.0

    for made in (Scaled(mlp, scale=2.0), Built(keras.initializers.Zeros())):
        made(X)
        with pytest.raises(NotImplementedError, match="cannot record the arguments.*get_config"):
            made.get_config()


def test_options_of_every_layer_are_kept():
    layer = Plain(mlp, dtype="bfloat16", autocast=False, activity_regularizer="l2", trainable=False)
    layer(X)
    for new in (Plain.from_config(layer.get_config()), copy.deepcopy(layer)):
        assert new.dtype_policy.name == "bfloat16" and not new.autocast and not new.trainable
        assert new.activity_regularizer is not None
    by_policy = Plain(lambda x: x * 2.0, dtype=keras.DTypePolicy("bfloat16"))
    by_policy(X)
    assert Plain.from_config(by_policy.get_config())(X).dtype == "bfloat16"


def test_pickle(layer: CompositeLayer):
    model = functional(layer)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_a_fresh_process_loads(tmp_path: Path, repository: Path):
    model = functional(MAKERS["nested"]())
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", X)
    script = """
        import keras, numpy as np, sys
        import test_composite
        model = keras.saving.load_model(sys.argv[1] + "/m.keras")
        np.save(sys.argv[1] + "/y.npy", np.array(model(np.load(sys.argv[1] + "/x.npy"))))
    """
    run(script, repository, str(tmp_path))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(X), atol=1e-6)


def run(script: str, repository: Path, *arguments: str, **variables: str) -> None:
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch(tmp_path: Path, repository: Path):
    pytest.importorskip("torch")
    script = """
        import copy, sys, keras, numpy as np
        from test_composite import MAKERS, WithParts, functional, CompositeLayer, X
        from test_structure import three_deep, optional_inputs
        for name in ("list", "parts", "outside", "nested"):
            layer = MAKERS[name]()
            model = functional(layer)
            model.save(sys.argv[1] + "/m.keras")
            loaded = keras.saving.load_model(sys.argv[1] + "/m.keras")
            rewired = layer.with_graph(layer.graph)
            expected = keras.ops.convert_to_numpy(model(X))
            for other in (loaded, copy.deepcopy(layer), rewired):
                received = keras.ops.convert_to_numpy(other(X))
                np.testing.assert_allclose(received, expected, atol=1e-6)
            assert rewired._attributes().keys() == layer._attributes().keys()
        assert layer._attributes() == {}
        assert WithParts(4)._attributes().keys() == {"first", "units", "blocks"}
        inputs = optional_inputs()
        model = keras.Model(inputs, three_deep()(inputs))
        model.save(sys.argv[1] + "/m.keras")
        loaded = keras.saving.load_model(sys.argv[1] + "/m.keras")
        for y in (None, X):
            a, b = (keras.ops.convert_to_numpy(m({"x": X, "y": y})) for m in (model, loaded))
            np.testing.assert_array_equal(a, b)
    """
    run(script, repository, str(tmp_path), KERAS_BACKEND="torch")


# Rewiring -----------------------------------------------------------------------------------


def scaled(graph: keras.Model, name: str = "rewired") -> keras.Model:
    """The same layers, and a last one that doubles."""
    return keras.Model(graph.inputs, layers.Rescaling(2.0, name=name)(graph.outputs[0]))


def test_with_graph(layer: CompositeLayer, tmp_path: Path):
    before = np.array(layer(X))
    assert layer.graph is not None
    new = layer.with_graph(scaled(layer.graph))
    assert type(new) is type(layer) and new.name == layer.name and new.path == layer.path
    assert {id(w) for w in new.weights} == {id(w) for w in layer.weights}
    np.testing.assert_array_equal(new(X), 2 * before)
    np.testing.assert_array_equal(layer(X), before)
    model = functional(new)
    model.save(tmp_path / "m.keras")
    copies = [keras.saving.load_model(tmp_path / "m.keras").layers[-1], copy.deepcopy(new)]
    copies.append(keras.models.clone_model(model).layers[-1])
    copies[-1].set_weights(new.get_weights())
    for other in copies:
        np.testing.assert_array_equal(other(X), 2 * before)
        assert isinstance(other.get_layer("rewired"), layers.Rescaling)
        check_same(layer, other)
    np.testing.assert_array_equal(copies[0].with_graph(scaled(copies[0].graph, "b"))(X), 4 * before)


def test_attributes_follow_a_rewiring(tmp_path: Path):
    """What is replaced is neither kept, nor saved, nor trained by way of an attribute."""
    layer = WithParts(4)
    layer(X)
    replaced = {"first": layers.Dense(4, name="first"), "by_method": layers.Dense(4, name="other")}

    def replace(inner: Any) -> Any:
        return next((r for name, r in replaced.items() if inner.name.startswith(name)), inner)

    assert layer.graph is not None
    new = layer.with_graph(clone_graph(layer.graph, replace))
    assert new.first is replaced["first"] and new.blocks[0] is layer.blocks[0]
    assert new.blocks[1] is replaced["by_method"] and len(new.weights) == 6
    assert layer.first is not new.first and isinstance(layer.blocks[1], ByMethod)
    functional(new).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras").layers[-1]
    for other in (loaded, copy.deepcopy(new)):
        assert other.blocks[1] in other.layers and other.first in other.layers
        assert len(other.weights) == 6
        np.testing.assert_array_equal(other(X), new(X))


def test_with_graph_of_another_shape():
    layer = CompositeLayer(mlp, name="it")
    layer(X)
    a, b = keras.Input((4,)), keras.Input((4,))
    with pytest.raises(ValueError, match="has 1 inputs and 1 outputs. Received a graph with 2 and"):
        layer.with_graph(keras.Model([a, b], a + b))
    named = keras.Input((4,), name="x")
    np.testing.assert_array_equal(
        layer.with_graph(keras.Model({"x": named}, named * 3.0))(X), 3 * X
    )


# Sharing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inside", "composite twice", "two graphs"])
def test_shared_layers_stay_shared(kind: str, tmp_path: Path):
    dense = layers.Dense(4)
    inside = CompositeLayer(lambda x: dense(ops.relu(dense(x))))
    inputs = keras.Input((4,))
    body = inside if kind == "inside" else lambda x: inside(inside(x) * 2.0)
    model = keras.Model(inputs, body(inputs))
    if kind == "two graphs":  # a layer called in another graph as well, before and after
        keras.Model(inputs, inside(dense(inside(inputs))))
        CompositeLayer(lambda x: inside(dense(x)))(X)
    assert len(model.weights) == 2
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (loaded, clone):
        assert len(other.weights) == 2
        np.testing.assert_array_equal(other(X), model(X))


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # as Keras 3.15.1 says
def test_stock_keras_loses_a_layer_shared_by_two_nested_graphs(tmp_path: Path):
    """A wall in Keras, with Functionals as with composites: loading fails, never silently."""
    dense = layers.Dense(4)
    for make in (CompositeLayer, lambda body: functional(body)):
        one, two = make(lambda x: dense(x * 2.0)), make(lambda x: dense(x))
        model = functional(lambda x, one=one, two=two: two(one(x)))
        model.save(tmp_path / "m.keras")
        with pytest.raises(ValueError, match="could not be loaded"):
            keras.saving.load_model(tmp_path / "m.keras")


def test_a_copy_frees_its_weights():
    layer = CompositeLayer(mlp)
    layer(X)
    new = copy.deepcopy(layer)
    new(X)
    size = sum(x.nbytes for x in jax.live_arrays())
    del new
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) < size


# Training, masks, shapes, dtypes ------------------------------------------------------------


def dropping() -> CompositeLayer:
    inner = CompositeLayer([layers.Dropout(0.5, seed=1)])
    return CompositeLayer(lambda x: CompositeLayer([inner])(x))


def test_training_is_passed_on():
    big = np.ones((2, 50), "float32")
    layer = dropping()
    inputs = keras.Input((50,))
    for call in (layer, keras.Model(inputs, layer(inputs)), keras.Sequential([dropping()])):
        np.testing.assert_array_equal(call(big), big)
        np.testing.assert_array_equal(call(big, training=False), big)
        assert (np.array(call(big, training=True)) == 0).any()
    always = keras.Model(inputs, dropping()(inputs, training=True))
    assert (np.array(always(big)) == 0).any()
    model = keras.Sequential([dropping(), layers.Dense(1)])
    model.compile("sgd", "mse")
    state = [np.array(v) for v in model.variables if "seed" in v.path]
    model.fit(big, big[:, :1], verbose=0)
    after = [np.array(v) for v in model.variables if "seed" in v.path]
    assert after and (not state or (state[0] != after[0]).any())


@register
class TakesMask(layers.Layer):
    """1 where the mask says so; 7 if there is none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        if mask is None:
            return ops.ones_like(x) * 7.0
        return ops.ones_like(x) * ops.cast(ops.expand_dims(mask, -1), x.dtype)


IDS = np.array([[1, 2, 0], [3, 0, 0]])
EXPECTED = (IDS > 0).astype("float32")


@pytest.mark.parametrize("where", ["inside", "after", "both inside", "several inputs"])
def test_masks_are_passed_on(where: str, tmp_path: Path):
    tokens = keras.Input((3,), dtype="int32")
    embed = layers.Embedding(5, 1, mask_zero=True)
    if where == "inside":
        outputs = CompositeLayer([CompositeLayer([TakesMask()])])(embed(tokens))
    elif where == "after":
        outputs = TakesMask()(CompositeLayer([CompositeLayer([layers.Dense(1)])])(embed(tokens)))
    elif where == "both inside":
        outputs = CompositeLayer([CompositeLayer([embed]), CompositeLayer([TakesMask()])])(tokens)
    else:
        both = CompositeLayer(lambda i: [TakesMask()(i["a"]), TakesMask()(i["b"][0])])
        outputs, unmasked = both(
            {"a": embed(tokens), "b": [ops.cast(tokens, "float32")[..., None]]}
        )
        np.testing.assert_array_equal(keras.Model(tokens, unmasked)(IDS)[..., 0], 7)
    model = keras.Model(tokens, outputs)
    model.save(tmp_path / "m.keras")
    others = [keras.saving.load_model(tmp_path / "m.keras"), clone_graph(model, lambda x: x)]
    for call in (model, lambda x: model.predict(x, verbose=0), *others):
        np.testing.assert_array_equal(call(IDS)[..., 0], EXPECTED)


def test_a_mask_given_as_argument():
    x, mask = ops.ones((2, 3, 1)), ops.convert_to_tensor(IDS > 0)
    layer = CompositeLayer([CompositeLayer([TakesMask()])])
    np.testing.assert_array_equal(layer(x, mask=mask)[..., 0], EXPECTED)
    np.testing.assert_array_equal(layer(x), 7 * x)  # x itself was not marked
    both = CompositeLayer(lambda i: [TakesMask()(i["a"]), TakesMask()(i["b"])])
    a, b = both({"a": x, "b": x}, mask={"a": None, "b": mask})
    np.testing.assert_array_equal(a, 7 * x)
    np.testing.assert_array_equal(b[..., 0], EXPECTED)
    with pytest.raises(ValueError, match=r"`mask` of .*expected the structure of the inputs \(2 "):
        both({"a": x, "b": x}, mask=mask)


def test_another_shape():
    layer = CompositeLayer(lambda x: [layers.Dense(3)(x), ops.mean(x, axis=1)])
    layer(keras.Input((None, 4)))
    for shape in ((2, 5, 4), (7, 5, 4), (2, 9, 4), (1, 1, 4)):
        a, b = layer(np.ones(shape, "float32"))
        assert a.shape == (*shape[:2], 3) and b.shape == (shape[0], 4)
        a, b = layer(keras.Input(batch_shape=shape))
        assert a.shape == (*shape[:2], 3) and b.shape == (shape[0], 4)
    a, b = layer(keras.Input((None, 4), dtype="float32"))
    assert a.shape == (None, None, 3) and b.shape == (None, 4)
    with pytest.raises(ValueError, match="incompatible"):
        layer(np.ones((2, 5, 3), "float32"))
    with pytest.raises(ValueError, match="incompatible"):
        layer(keras.Input((5, 3)))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float32"])
def test_dtypes(policy: str):
    def body(i: Any) -> Any:
        inner = CompositeLayer([layers.Dense(2, dtype=policy)], dtype=policy)
        return {"y": inner(i["x"]) * 1.0, "x": i["x"], "ids": i["ids"] + 1, "on": i["on"]}

    layer = CompositeLayer(body, dtype=policy)
    expected = "bfloat16" if "bfloat16" in policy else "float32"
    ids, on = np.ones((2,), "int32"), np.ones((2,), "bool")
    for dtype in ("float64", "float32", "float16"):
        outputs = layer({"x": X.astype(dtype), "ids": ids, "on": on})
        assert outputs["y"].dtype == expected and outputs["x"].dtype == expected
        assert outputs["ids"].dtype == "int32" and outputs["on"].dtype == "bool"
        x = keras.Input((4,), dtype=dtype)
        symbolic = layer({"x": x, "ids": keras.Input((), dtype="int32"), "on": on})
        assert symbolic["y"].dtype == expected and symbolic["ids"].dtype == "int32"
    assert {w.dtype for w in layer.weights} == {"bfloat16" if policy == "bfloat16" else "float32"}


def test_build_by_hand_knows_the_dtype_of_calls():
    layer = CompositeLayer(lambda x: x * 2.0, dtype="bfloat16")
    layer.build(keras.KerasTensor((None, 4), "float32"))
    assert layer.graph is not None and layer.graph.inputs[0].dtype == "bfloat16"
    assert layer(X).dtype == "bfloat16"
    kept = CompositeLayer(lambda x: x * 2.0, dtype="bfloat16", autocast=False)
    assert kept(X).dtype == "float32"


def test_trainable_reaches_the_inside():
    early, late = CompositeLayer([WithParts(4)], trainable=False), CompositeLayer([WithParts(4)])
    model = keras.Sequential([keras.Input((4,)), early, late])
    assert len(model.trainable_weights) == 5 and early.trainable_weights == []
    late.trainable = False
    assert model.trainable_weights == [] and len(model.weights) == 10
    assert all(not w.trainable for w in late.weights)
    clone = keras.models.clone_model(model)
    assert clone.trainable_weights == [] and len(clone.weights) == 10
    late.trainable = True
    assert len(model.trainable_weights) == 5


def test_losses_are_collected():
    def body(x: Any) -> Any:
        x = layers.Dense(2, kernel_regularizer="l2")(x)
        return layers.ActivityRegularization(l2=1.0)(x)

    layer = CompositeLayer([CompositeLayer(body)], activity_regularizer="l2")
    model = functional(layer)
    model(X)
    assert len(layer.losses) == 3 and len(model.losses) == 3


def test_fit_and_stateless_call():
    model = keras.Sequential([MAKERS["nested"](), CompositeLayer([layers.Dense(1)])])
    model.compile("sgd", "mse")
    history = model.fit(X, X[:, :1], epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    layer = model.layers[0]
    trainable = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]
    outputs, _ = jax.jit(layer.stateless_call)(trainable, rest, X)
    np.testing.assert_allclose(outputs, layer(X), atol=1e-6)


# Looking ------------------------------------------------------------------------------------


def test_summary_shows_what_is_inside():
    lines: list[str] = []
    outer = CompositeLayer([CompositeLayer([layers.Dense(4, name="deep")], name="mid")], name="out")
    functional(outer).summary(expand_nested=True, print_fn=lines.append)
    assert "deep" in "".join(lines) and "mid" in "".join(lines)


def test_attributes_are_those_that_a_subclass_or_a_user_has_set():
    assert MAKERS["nested"]()._attributes() == {}
    layer = WithParts(4)
    layer.note = "mine"
    assert set(layer._attributes()) == {"units", "first", "blocks", "note"}
