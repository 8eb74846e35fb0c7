"""Rewiring, selecting, looking: the new graph does as told, the old one stays as it was."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops, tree

import functional_llm as flm
from configs import CONFIGS
from functional_llm.graph.composite import CompositeLayer
from reference import save_reference

IDS = np.random.default_rng(0).integers(0, 128, (2, 9)).astype("int32")


@pytest.fixture(scope="module", params=["llama_multi_head_tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(CONFIGS[request.param], folder)
    return str(folder)


@pytest.fixture
def backbone(folder: str) -> Any:
    return flm.Backbone.from_preset(folder)


class Plus(keras.layers.Layer):
    """A layer of the user: the output of another, plus an offset that trains."""

    def __init__(self, base: Any, start: float = 0.0) -> None:
        super().__init__(name=base.name)
        self.base, self.start = base, start
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        self.offset = self.add_weight(
            shape=(self.base.units,),
            initializer=keras.initializers.Constant(self.start),
            name="offset",
        )

    def call(self, x: Any) -> Any:
        return self.base(x) + self.offset

    def get_config(self) -> dict[str, Any]:
        base = keras.saving.serialize_keras_object(self.base)
        return {"base": base, "start": self.start}


def _logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS))


def _array(variable: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(variable.value))


def _snapshot(model: Any) -> Any:
    layers = dict(flm.walk(model, composites=True))
    return (
        {
            path: (id(x), len(x._inbound_nodes), len(x._outbound_nodes))
            for path, x in layers.items()
        },
        [(id(v), v.trainable) for v in model.variables],
        [id(v) for v in model.trainable_variables],
        len(model.layers),
    )


# What stays


def test_nothing_changed_is_the_same_model(backbone: Any) -> None:
    before = _snapshot(backbone)
    expected = _logits(backbone)
    model = flm.rewire(backbone, lambda layer, path: layer)
    assert type(model) is flm.Backbone
    assert model.config is backbone.config
    assert model.name == backbone.name
    assert list(map(id, model.variables)) == list(map(id, backbone.variables))
    np.testing.assert_array_equal(_logits(model), expected)
    assert _snapshot(backbone) == before
    specs = tree.map_structure(lambda x: (x.shape, x.dtype, x.name), model.input)
    assert specs == tree.map_structure(lambda x: (x.shape, x.dtype, x.name), backbone.input)
    paths = [path for path, _ in flm.walk(model, composites=True)]
    assert paths == [path for path, _ in flm.walk(backbone, composites=True)]


def test_every_leaf_is_asked_once_with_its_path(backbone: Any) -> None:
    asked: list[tuple[str, int]] = []

    def note(layer: Any, path: str) -> Any:
        asked.append((path, id(layer)))
        return layer

    flm.rewire(backbone, note)
    assert asked == [(path, id(layer)) for path, layer in flm.walk(backbone)]
    assert len({key for _, key in asked}) == len(asked)
    assert "decoder_1/attention/query" in dict(asked)
    assert "decoder_1/attention" not in dict(asked)


def test_replacing_moves_the_new_model_only(backbone: Any) -> None:
    before, expected = _snapshot(backbone), _logits(backbone)
    same = flm.rewire(backbone, lambda layer, path: Plus(layer), where="query")
    np.testing.assert_allclose(_logits(same), expected, atol=1e-6)
    moved = flm.rewire(backbone, lambda layer, path: Plus(layer, 0.5), where="query")
    assert np.abs(_logits(moved) - expected).max() > 1e-3
    np.testing.assert_array_equal(_logits(backbone), expected)
    assert _snapshot(backbone) == before
    new = [v for v in moved.variables if all(v is not w for w in backbone.variables)]
    assert [v.path for v in new] == [f"{path}/offset" for path in flm.select(backbone, "query")]


def test_a_rewired_model_decodes_with_its_cache(backbone: Any) -> None:
    model = flm.rewire(backbone, lambda layer, path: Plus(layer, 0.3), where=["query", "value"])
    ids = IDS[0].tolist()
    written = flm.TextGenerator(model).generate_ids([ids], max_new_tokens=8)[0]
    logits = np.asarray(model(np.array([ids + written])))
    assert written == logits[0, len(ids) - 1 : -1].argmax(axis=-1).tolist()
    assert written != flm.TextGenerator(backbone).generate_ids([ids], max_new_tokens=8)[0]


def test_rewiring_a_rewired_model(backbone: Any) -> None:
    once = flm.rewire(backbone, lambda layer, path: Plus(layer, 0.5), where="query")
    expected = _logits(once)
    twice = flm.rewire(once, lambda layer, path: Plus(layer, 0.5), where="value")
    np.testing.assert_array_equal(_logits(once), expected)
    back = flm.rewire(twice, lambda layer, path: layer.base, where=Plus)
    np.testing.assert_array_equal(_logits(back), _logits(backbone))
    assert list(map(id, back.variables)) == list(map(id, backbone.variables))


def test_bfloat16_stays(folder: str) -> None:
    backbone = flm.Backbone.from_preset(folder, dtype="bfloat16")
    model = flm.rewire(backbone, call=lambda layer, path, *a, **k: layer(*a, **k), where="query")
    np.testing.assert_array_equal(_logits(model), _logits(backbone))
    assert {v.dtype for v in model.variables} == {"bfloat16"}


def test_a_dropped_model_is_freed(backbone: Any) -> None:
    model = flm.rewire(backbone, lambda layer, path: Plus(layer), where="query", freeze=True)
    model(IDS)
    layer = model.get_layer("decoder_0").get_layer("attention").get_layer("query")
    watched = [weakref.ref(layer), weakref.ref(model)]
    del model, layer
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


# Training


def _loss(labels: Any, logits: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def test_freezing_is_of_the_new_model(backbone: Any) -> None:
    model = flm.rewire(backbone, lambda layer, path: Plus(layer), where="query", freeze=True)
    assert [v.path for v in model.trainable_variables] == [
        f"{path}/offset" for path in flm.select(backbone, "query")
    ]
    assert len(backbone.trainable_variables) == len(backbone.variables)
    assert all(v.trainable for v in backbone.variables)
    assert len(model.trainable_weights) + len(model.non_trainable_weights) == len(model.weights)
    later = flm.rewire(model)
    assert list(map(id, later.trainable_variables)) == list(map(id, model.trainable_variables))
    thawed = flm.rewire(model, freeze=False)
    assert len(thawed.trainable_variables) == len(thawed.variables)


def test_fitting_both(backbone: Any) -> None:
    labels = np.roll(IDS, -1, axis=1)
    backbone.compile(keras.optimizers.SGD(1e-2), _loss)
    backbone.fit(IDS, labels, verbose=0)
    state = vars(backbone).copy()
    model = flm.rewire(backbone, lambda layer, path: Plus(layer), where="query", freeze=True)
    assert not model.compiled
    assert not set(vars(model)) - set(vars(flm.rewire(backbone)))
    values = [_array(v) for v in backbone.variables]
    model.compile(keras.optimizers.Adam(1e-1), _loss)
    model.fit(IDS, labels, verbose=0, epochs=2)
    for variable, value in zip(backbone.variables, values, strict=True):
        np.testing.assert_array_equal(_array(variable), value)
    assert all(np.abs(_array(v)).max() > 0 for v in model.trainable_variables)
    for name in ("optimizer", "history", "train_function", "_compile_loss", "compiled"):
        assert vars(backbone)[name] is state[name], name
    steps = int(backbone.optimizer.iterations)
    backbone.fit(IDS, labels, verbose=0)
    assert int(backbone.optimizer.iterations) == steps + 1
    assert np.abs(_array(backbone.variables[0]) - values[0]).max() > 0
    shared = model.get_layer("decoder_0").get_layer("attention").get_layer("key").kernel
    own = backbone.get_layer("decoder_0").get_layer("attention").get_layer("key").kernel
    assert shared is own


def test_a_stock_model_says_how_to_freeze() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(3, name="a")(x))

    def offset(layer: Any, path: str) -> Any:
        return Plus(layer)

    with pytest.raises(ValueError, match=r"model.trainable = False.* mixin `Freezable`"):
        flm.rewire(model, offset, freeze=True)
    assert all(v.trainable for v in model.variables)
    model.trainable = False
    new_model = flm.rewire(model, offset, freeze=True)
    assert [v.path for v in new_model.trainable_variables] == ["a/offset"]


# Graphs of every kind


class Pair(CompositeLayer):
    """Counts how often its graph is built, and keeps a layer and a number as attributes."""

    built_graphs = 0

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units

    def functional_build(self, inputs: Any) -> Any:
        type(self).built_graphs += 1
        self.first = keras.layers.Dense(self.units, name="first")
        x = ops.relu(self.first(inputs["x"]))
        if inputs.get("y") is not None:
            x = Maybe(name="maybe")({"x": x, "y": inputs["y"]})
        return {"x": x, "twice": x * 2}


class Maybe(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        return inputs["x"] if inputs["y"] is None else inputs["x"] + inputs["y"]

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs["x"].shape, inputs["x"].dtype)


@pytest.fixture
def pair() -> Iterator[Any]:
    inputs = {"x": keras.Input((3,), name="x"), "y": keras.Input((4,), name="y", optional=True)}
    result = Pair(4, name="pair")(inputs)
    yield keras.Model(inputs, keras.layers.Add(name="add")([result["x"], result["twice"]]))


def test_a_composite_subclass_keeps_class_config_and_attributes(pair: Any) -> None:
    count = Pair.built_graphs
    new_model = flm.rewire(pair, lambda layer, path: Plus(layer, 1.0), where="pair/first")
    old, new = pair.get_layer("pair"), new_model.get_layer("pair")
    assert Pair.built_graphs == count
    assert type(new) is Pair
    assert new is not old
    assert (new.units, new.name, new.get_config()["units"]) == (4, "pair", 4)
    assert isinstance(new.first, Plus)
    assert new.first is new.get_layer("first")
    assert type(old.first) is keras.layers.Dense
    x, y = np.ones((2, 3), "float32"), np.ones((2, 4), "float32")
    for optional in (y, None):
        inputs = {"x": x, "y": optional}
        expected = 3 * (np.maximum(np.array(old.first(x)) + 1, 0) + (0 if optional is None else y))
        np.testing.assert_allclose(np.array(new_model(inputs)), expected, rtol=1e-5)


def test_a_block_alone_can_be_rewired(pair: Any) -> None:
    block = pair.get_layer("pair")
    new = flm.rewire(block, lambda layer, path: Plus(layer, 1.0), where=keras.layers.Dense)
    assert type(new) is Pair
    x = {"x": np.ones((2, 3), "float32"), "y": None}
    assert np.abs(np.array(new(x)["twice"]) - np.array(block(x)["twice"])).max() > 0.1


def test_a_layer_used_twice_stays_one() -> None:
    x = keras.Input((4,))
    shared = keras.layers.Dense(4, name="shared")
    block = CompositeLayer(lambda x: shared(x) + 1.0, name="block")
    model = keras.Model(x, shared(block(shared(x))))
    made: list[Any] = []

    def replace(layer: Any, path: str) -> Any:
        made.append(Plus(layer, 0.1))
        return made[-1]

    new_model = flm.rewire(model, replace, where="shared")
    assert len(made) == 1
    assert new_model.get_layer("shared") is made[0]
    assert new_model.get_layer("block").get_layer("shared") is made[0]
    assert len(new_model.variables) == 3
    value = np.ones((1, 4), "float32")

    def plus(x: Any) -> Any:
        return np.array(shared(x)) + np.float32(0.1)

    np.testing.assert_allclose(np.array(new_model(value)), plus(plus(plus(value)) + 1), rtol=1e-5)


def test_nested_stock_models_and_sequentials() -> None:
    inner_input = keras.Input((4,), name="i")
    inner = keras.Model(inner_input, keras.layers.Dense(4, name="a")(inner_input), name="inner")
    chain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="b")], name="chain")
    x = keras.Input((4,))
    model = keras.Model(x, chain(inner(x)) * 2.0)
    assert [path for path, _ in flm.walk(model)] == ["inner/a", "chain/b"]
    value = np.ones((1, 4), "float32")
    expected = np.array(model(value))
    new_model = flm.rewire(model, lambda layer, path: Plus(layer, 1.0), where="b")
    assert type(new_model.get_layer("chain")) is keras.Sequential
    np.testing.assert_allclose(np.array(new_model(value)), expected + 2, rtol=1e-5)
    dropped = flm.rewire(model, call=lambda layer, path, x: x, where=["a", "b"])
    np.testing.assert_allclose(np.array(dropped(value)), value * 2)
    captured = flm.capture(model, keras.layers.Dense)(value)
    assert [x.shape for x in captured["captured"].values()] == [(1, 4), (1, 5)]
    np.testing.assert_allclose(np.array(captured["outputs"]), expected)
    new_chain = flm.rewire(chain, lambda layer, path: Plus(layer, 1.0))
    assert type(new_chain) is keras.Sequential
    np.testing.assert_array_equal(np.array(model(value)), expected)


def test_masks_survive() -> None:
    ids = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 4, mask_zero=True, name="embedding")(ids)
    x = keras.layers.LSTM(3, name="lstm")(keras.layers.Dense(4, name="dense")(x))
    model = keras.Model(ids, x)
    value = np.array([[1, 2, 0, 0, 0], [1, 2, 3, 4, 5]])
    expected = np.array(model(value))
    np.testing.assert_allclose(np.array(flm.rewire(model)(value)), expected, rtol=1e-6)
    new_model = flm.rewire(model, lambda layer, path: Plus(layer), where="dense")
    padded = np.array([[1, 2, 0, 0, 0], [1, 2, 0, 0, 0]])
    result = np.array(new_model(padded))
    np.testing.assert_allclose(result[0], result[1], rtol=1e-6)


def test_another_width() -> None:
    x = keras.Input((4,))
    body = CompositeLayer(
        [keras.layers.Dense(6, name="up"), keras.layers.Dense(3, name="down")], name="body"
    )
    model = keras.Model(x, keras.layers.Dense(2, name="out")(body(x)))

    def wider(layer: Any, path: str) -> Any:
        return keras.layers.Dense(8, name=layer.name) if path.endswith("up") else layer

    with pytest.raises(ValueError, match="expected axis -1"):  # `down` has its weights already
        flm.rewire(model, wider)

    def both(layer: Any, path: str) -> Any:
        units = {"body/up": 8, "body/down": 5, "out": 7}[path]
        return keras.layers.Dense(units, name=layer.name)

    new_model = flm.rewire(model, both)
    assert new_model.output_shape == (None, 7)
    assert new_model.get_layer("body").get_layer("down").kernel.shape == (8, 5)
    assert [v.path for v in new_model.variables][0] == "body/up/kernel"


# The general form


def test_calls_before_after_around_and_instead(pair: Any) -> None:
    x = {"x": np.array([[1.0, -2.0, 3.0]], "float32"), "y": None}
    first = pair.get_layer("pair").get_layer("first")

    def run(call: Any, where: Any = "first") -> np.ndarray:
        return np.array(flm.rewire(pair, call=call, where=where)(x))

    def expected(change: Any, after: Any = lambda y: y) -> np.ndarray:
        return 3 * np.maximum(after(np.array(first(change(x["x"])))), 0)

    before = run(lambda layer, path, x: layer(x + 1.0))
    np.testing.assert_allclose(before, expected(lambda x: x + 1), rtol=1e-5)
    after = run(lambda layer, path, x: layer(x) + 1.0)
    np.testing.assert_allclose(after, expected(lambda x: x, lambda y: y + 1), rtol=1e-5)
    around = run(lambda layer, path, x: layer(x) + keras.layers.Dense(4, name="side")(x) * 0)
    np.testing.assert_allclose(around, expected(lambda x: x), rtol=1e-5)
    whole = run(lambda layer, path, x: {k: v + 1.0 for k, v in layer(x).items()}, where="pair")
    np.testing.assert_allclose(whole, expected(lambda x: x) + 2, rtol=1e-5)


def test_a_block_is_dropped(backbone: Any) -> None:
    last = f"decoder_{backbone.config.num_layers - 1}"

    def skip(layer: Any, path: str, inputs: Any) -> Any:
        return {"x": inputs["x"], "cache": layer(inputs)["cache"]}

    model = flm.rewire(backbone, call=skip, where=last)
    hidden = flm.capture(backbone, last, inputs=True)(IDS)["captured"][last]["x"]
    norm = backbone.get_layer("final_norm")
    tied = backbone.config.tie_word_embeddings
    head = backbone.get_layer("token_embedding" if tied else "head")
    expected = head(norm(hidden), reverse=True) if tied else head(norm(hidden))
    np.testing.assert_allclose(_logits(model), np.asarray(expected), atol=1e-5)
    assert len(flm.TextGenerator(model).generate_ids([[1, 2]], 3)[0]) == 3


@pytest.mark.parametrize("where", ["decoder_0/mlp", "decoder_1/mlp/gate", "mlp_norm", "final_norm"])
def test_a_call_gets_the_arguments_that_were_given(backbone: Any, where: str) -> None:
    received: list[Any] = []

    def note(layer: Any, path: str, x: Any, **kwargs: Any) -> Any:
        received.append(kwargs)
        return layer(x)

    model = flm.rewire(backbone, call=note, where=where)
    assert received and not any(received)
    np.testing.assert_array_equal(_logits(model), _logits(backbone))


def test_bad_replacements(backbone: Any) -> None:
    with pytest.raises(TypeError, match=r"returned None for 'decoder_0/attention/query'"):
        flm.rewire(backbone, lambda layer, path: None, where="decoder_0/attention/query")
    with pytest.raises(ValueError, match=r"'decoder_0' now returned .*3 symbolic tensors"):
        flm.rewire(backbone, call=lambda layer, path, x: x["x"], where="decoder_0")
    for bad in (keras.layers.Dense(3), CompositeLayer([keras.layers.Dense(3)]), backbone.get_layer):
        if not isinstance(bad, CompositeLayer):
            with pytest.raises(TypeError, match="no graph to walk"):
                flm.rewire(bad)


# Selecting


def test_patterns(backbone: Any) -> None:
    def paths(where: Any) -> list[str]:
        return list(flm.select(backbone, where))

    layers = range(backbone.config.num_layers)
    assert paths("decoder_*/attention/query") == [f"decoder_{i}/attention/query" for i in layers]
    assert paths("query") == paths("**/query") == paths("**/attention/query")
    assert paths("decoder_*") == [f"decoder_{i}" for i in layers]
    assert paths("decoder_[1-9]/mlp/*")[0] == "decoder_1/mlp/gate"
    inside = paths("decoder_0/**")
    assert "decoder_0/attention" in inside
    assert "decoder_0/attention/query" in inside
    assert "decoder_0" not in inside
    assert paths(["value", "query"])[:2] == [
        "decoder_0/attention/query",
        "decoder_0/attention/value",
    ]
    dense = paths(keras.layers.Dense)
    assert dense == [p for p, x in flm.walk(backbone) if isinstance(x, keras.layers.Dense)]
    assert paths(lambda layer, path: path.startswith("decoder_1/mlp_")) == ["decoder_1/mlp_norm"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "decoder_*/attention/qery",
            r"matches 'decoder_\*/attention/qery'. Near .*attention/query",
        ),
        ("querry", "Near it: decoder_0/attention/query"),
        ("*/query", "Near it: .*attention/query"),
        (["query", "nothing_like_it"], "matches 'nothing_like_it'"),
        (keras.layers.Conv1D, "matches Conv1D"),
        ([], "at least one"),
    ],
)
def test_what_matches_nothing(backbone: Any, where: Any, message: str) -> None:
    for use in (flm.select, flm.capture):
        with pytest.raises(ValueError, match=message):
            use(backbone, where)
    with pytest.raises(ValueError, match=message):
        flm.rewire(backbone, lambda layer, path: layer, where=where)


# Looking


def test_tree_view_counts_and_marks(backbone: Any) -> None:
    model = flm.rewire(backbone, lambda layer, path: Plus(layer), where="query", freeze=True)
    text = flm.tree_view(model, original=backbone)
    lines = text.splitlines()
    total = sum(int(np.prod(v.shape)) for v in model.variables)
    new = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert lines[0].startswith(f"{model.name} (Backbone)  {total:,} weights, {new:,} trainable")
    marked = [line.strip().split(" (")[0] for line in lines if line.strip()[0] in "+*"]
    assert marked[:3] == ["* decoder_0", "* attention", "+ query"]
    assert len(marked) == 3 * backbone.config.num_layers
    assert (
        len(flm.tree_view(model, depth=1).splitlines())
        == len(list(model.layers))
        - len([x for x in model.layers if isinstance(x, keras.layers.InputLayer)])
        + 1
    )


# Activations


def test_captured_outputs_are_those_of_the_layers(backbone: Any) -> None:
    model = flm.capture(backbone, ["decoder_*", "query", "token_embedding"])
    result = model(IDS)
    np.testing.assert_array_equal(np.asarray(result["logits"]), _logits(backbone))
    captured = result["captured"]
    norm = backbone.get_layer("decoder_0").get_layer("attention_norm")
    query = backbone.get_layer("decoder_0").get_layer("attention").get_layer("query")
    expected = query(norm(captured["token_embedding"]))
    np.testing.assert_allclose(
        np.asarray(captured["decoder_0/attention/query"]), np.asarray(expected), atol=1e-5
    )
    hidden = captured[f"decoder_{backbone.config.num_layers - 1}"]["x"]
    hidden = backbone.get_layer("final_norm")(hidden)
    if backbone.config.tie_word_embeddings:
        logits = backbone.get_layer("token_embedding")(hidden, reverse=True)
        np.testing.assert_allclose(
            np.asarray(captured["token_embedding#2"]), np.asarray(logits), atol=1e-5
        )
    else:
        logits = backbone.get_layer("head")(hidden)
    np.testing.assert_allclose(np.asarray(result["logits"]), np.asarray(logits), atol=1e-5)


def test_capturing_through_the_cache(backbone: Any) -> None:
    model = flm.capture(backbone, "decoder_1/attention/value")
    whole = np.asarray(model(IDS)["captured"]["decoder_1/attention/value"])
    cache, pieces = flm.make_cache(model, 2, 16), []
    for start in range(IDS.shape[1]):
        result = model({"token_ids": IDS[:, start : start + 1], "cache": cache})
        cache = result["cache"]
        pieces.append(np.asarray(result["captured"]["decoder_1/attention/value"]))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)
    written = flm.TextGenerator(model).generate_ids([[1, 2, 3]], 5)
    assert written == flm.TextGenerator(backbone).generate_ids([[1, 2, 3]], 5)


def test_captured_inputs(backbone: Any) -> None:
    outputs = flm.capture(backbone, "decoder_0/mlp_norm")(IDS)["captured"]
    inputs = flm.capture(backbone, "decoder_0/mlp/gate", inputs=True)(IDS)["captured"]
    np.testing.assert_array_equal(
        np.asarray(inputs["decoder_0/mlp/gate"]), np.asarray(outputs["decoder_0/mlp_norm"])
    )
    again = flm.capture(flm.capture(backbone, "query"), "value")(IDS)["captured"]
    assert list(again) == ["decoder_0/attention/value", "decoder_1/attention/value"]
