"""PEFT methods on a tiny model of every family, and what they refuse."""

import inspect
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones import families
from functional_llm.graph.freezing import freeze_variables
from nightly import FAMILIES_AND_KINDS, one_of_each_layout
from pair import compiled
from reference import save_reference

IDS = np.random.default_rng(0).integers(0, 128, (2, 9)).astype("int32")


METHODS: dict[str, Any] = {
    "lora": lambda model, **kw: flm.peft.lora(model, 3, 5, targets="all", **kw),
    "pissa": lambda model, **kw: flm.peft.lora(model, 3, 5, init="pissa", **kw),
    "dora": lambda model, **kw: flm.peft.dora(model, 3, 5, **kw),
    "svf": lambda model, **kw: flm.peft.svf(model, targets="all", **kw),
    "ia3": lambda model, **kw: flm.peft.ia3(model, **kw),
    "bitfit": lambda model, **kw: flm.peft.bitfit(model, **kw),
}


@pytest.fixture(scope="module", params=FAMILIES_AND_KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that no test may change."""
    folder = tmp_path_factory.mktemp(request.param)
    save_reference(CONFIGS[request.param], folder)
    return flm.Backbone.from_preset(str(folder))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("one")
    save_reference(CONFIGS["llama_biases"], folder)
    return flm.Backbone.from_preset(str(folder))


def _logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS).astype("float32"))


def _array(variable: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(variable.value))


def _move(model: Any, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.1)


def _loss(labels: Any, logits: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


# Every method on every family


@pytest.mark.parametrize("backbone", ["llama_grouped", "gpt2_tied"], indirect=True)
@pytest.mark.parametrize("name", METHODS)
def test_attach_merge_save_load(backbone: Any, name: str, tmp_path: Path) -> None:
    base, kept = _logits(backbone), [(id(v), v.trainable) for v in backbone.variables]
    trainable = list(map(id, backbone.trainable_variables))
    model = METHODS[name](backbone)
    assert type(model) is flm.Backbone
    np.testing.assert_allclose(_logits(model), base, atol=1e-5)
    own = model.trainable_variables
    assert own
    assert not set(map(id, own)) & set(map(id, backbone.variables))
    assert set(map(id, backbone.variables)) <= set(map(id, model.variables))
    _move(model)
    moved = _logits(model)
    assert np.abs(moved - base).max() > 1e-2
    merged = flm.peft.merge(model)
    np.testing.assert_allclose(_logits(merged), moved, atol=1e-4)
    assert not flm.peft.adapter_names(merged)
    assert {type(x) for _, x in flm.walk(merged)} == {type(x) for _, x in flm.walk(backbone)}
    paths = {v.path for v in backbone.variables}
    assert {v.path for v in merged.variables} - paths <= {
        f"{path}/bias" for path in flm.select(backbone, keras.layers.Dense)
    }
    assert len(merged.trainable_variables) == len(merged.variables)
    back = flm.peft.unmerge(merged)
    np.testing.assert_array_equal(_logits(back), moved)
    assert set(map(id, back.trainable_variables)) == set(map(id, own))
    flm.peft.save_adapter(model, tmp_path)
    loaded = flm.peft.load_adapter(backbone, tmp_path)
    np.testing.assert_allclose(_logits(loaded), moved, atol=1e-5)
    np.testing.assert_array_equal(_logits(backbone), base)
    assert [(id(v), v.trainable) for v in backbone.variables] == kept
    assert list(map(id, backbone.trainable_variables)) == trainable


@one_of_each_layout
def test_methods_fit_every_family(backbone: Any) -> None:
    """Three kinds of change: to a kernel, to inputs and outputs, to a bias."""
    model = flm.peft.lora(backbone, 2, 5, targets="all", adapter_name="lora")
    for name in ("ia3", "bitfit"):
        model = METHODS[name](model, adapter_name=name)
    run, base = compiled(model), compiled(backbone)(IDS)
    np.testing.assert_allclose(run(IDS), base, atol=1e-5)
    _move(model)
    moved = run(IDS)
    assert np.abs(moved - base).max() > 1e-2
    np.testing.assert_allclose(compiled(flm.peft.merge(model))(IDS), moved, atol=2e-4)


def test_all_methods_at_once_train_and_write(one: Any) -> None:
    model = one
    for name, attach in METHODS.items():
        model = attach(model, adapter_name=name)
    assert flm.peft.adapter_names(model) == sorted(METHODS)
    np.testing.assert_allclose(_logits(model), _logits(one), atol=1e-5)
    last = {id(v) for v in model.trainable_variables}
    adapters = [x for _, x in flm.walk(model) if isinstance(x, flm.peft.Adapter)]
    own = [v for x in adapters for a in x.chain() for v in a.adapter_weights.values()]
    assert last < {id(v) for v in own}
    freeze_variables(model, [v for v in model.variables if all(v is not w for w in own)])
    kept = [_array(v) for v in one.variables]
    first = [_array(v) for v in own]
    model.compile(keras.optimizers.SGD(0.05), _loss)
    model.fit(IDS, np.roll(IDS, -1, axis=1), epochs=2, verbose=0)
    for variable, value in zip(one.variables, kept, strict=True):
        np.testing.assert_array_equal(_array(variable), value)
    assert all(np.any(_array(v) != x) for v, x in zip(own, first, strict=True))
    _move(model)
    merged = flm.peft.merge(model)
    np.testing.assert_allclose(_logits(merged), _logits(model), atol=2e-4)
    rows = _rows(4)
    written = flm.TextGenerator(model).generate_ids(rows, max_new_tokens=12)
    token_ids = np.array([row + new for row, new in zip(rows, written, strict=True)])
    greedy = [np.asarray(x(token_ids))[:, 8:-1].argmax(axis=-1) for x in (model, one)]
    np.testing.assert_array_equal(np.array(written), greedy[0])
    assert np.any(greedy[0] != greedy[1])


def _rows(count: int) -> list[list[int]]:
    return np.random.default_rng(7).integers(0, 128, (count, 9)).tolist()


# Several adapters


def test_adapters_are_switched_without_compiling(one: Any) -> None:
    model = flm.peft.lora(one, 2, adapter_name="a")
    _move(model, seed=1)
    only_a = _logits(model)
    model = flm.peft.svf(model, adapter_name="b")
    _move(model, seed=2)
    both = _logits(model)
    generator = flm.TextGenerator(model)
    prompt = [IDS[0].tolist()]
    results = {}
    for names in (None, "a", ["a"], "b", ["a", "b"]):
        flm.peft.activate(model, names)
        results[str(names)] = _logits(model)
        generator.generate_ids(prompt, 8)
        merged = flm.peft.merge(model)
        np.testing.assert_allclose(_logits(merged), results[str(names)], atol=1e-4)
    assert generator.num_compilations == 2
    np.testing.assert_array_equal(results["None"], _logits(one))
    np.testing.assert_allclose(results["a"], only_a, atol=1e-6)
    np.testing.assert_array_equal(results["a"], results["['a']"])
    np.testing.assert_array_equal(results["['a', 'b']"], both)
    assert np.abs(results["b"] - results["a"]).max() > 1e-2
    base_size = sum(v.value.nbytes for v in one.variables)
    assert sum(v.value.nbytes for v in model.variables) < 1.5 * base_size
    with pytest.raises(ValueError, match=r"No adapter \['c'\]. The model has \['a', 'b'\]"):
        flm.peft.activate(model, ["a", "c"])


def test_adapters_are_saved_one_by_one(one: Any, tmp_path: Path) -> None:
    model = flm.peft.lora(one, 2, adapter_name="a")
    _move(model)
    only_a = _logits(model)
    model = flm.peft.lora(model, 3, targets="all", adapter_name="b")
    _move(model)
    flm.peft.save_adapter(model, tmp_path / "a", "a")
    flm.peft.save_adapter(model, tmp_path / "b", "b")
    loaded = flm.peft.load_adapter(one, tmp_path / "a", "a")
    np.testing.assert_allclose(_logits(loaded), only_a, atol=1e-5)
    loaded = flm.peft.load_adapter(loaded, tmp_path / "b", "b")
    np.testing.assert_allclose(_logits(loaded), _logits(model), atol=1e-5)
    for name in (None, "c"):
        with pytest.raises(ValueError, match=rf"one of \['a', 'b'\], received {name!r}"):
            flm.peft.save_adapter(model, tmp_path / "c", name)
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        flm.peft.lora(model, adapter_name="a")
    with pytest.raises(ValueError, match=r"one of \[\], received None"):
        flm.peft.save_adapter(one, tmp_path / "c")


# A method that the library has never seen


class Shift(flm.peft.Adapter):
    """Rows of the matrix are scaled, outputs are moved, and a layer of its own bends the input."""

    def __init__(self, base: Any, power: int = 2, **kwargs: Any) -> None:
        super().__init__(base, **kwargs)
        self.power = power

    def make_weights(self, linear: flm.peft.Linear) -> None:
        self.rows = self.add_weight((linear.in_size, 1), "zeros", name="rows")
        self.inner = keras.layers.Dense(linear.out_size, kernel_initializer="zeros", name="inner")
        self.inner.build((None, linear.in_size))

    def kernel_change(self) -> Any:
        return self.linear.kernel() * self.rows**self.power + self.inner.kernel

    def bias_change(self) -> Any:
        return self.inner.bias

    def get_options(self) -> dict[str, Any]:
        return {"power": self.power}


def test_a_method_of_the_users(one: Any, tmp_path: Path) -> None:
    def make(layer: Any, path: str, **kwargs: Any) -> Any:
        return Shift(layer, power=3, **kwargs)

    model = flm.peft.attach(one, make, ["query", "mlp/*", "head"][:1] + ["decoder_*/mlp/*"])
    np.testing.assert_allclose(_logits(model), _logits(one), atol=1e-5)
    names = {v.path.rpartition("query/")[2] for v in model.trainable_variables}
    assert {"rows", "inner/kernel", "inner/bias"} <= names
    _move(model)
    moved = _logits(model)
    np.testing.assert_allclose(_logits(flm.peft.merge(model)), moved, atol=1e-4)
    flm.peft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers"]["decoder_0/attention/query"] == {"power": 3}
    loaded = flm.peft.load_adapter(one, tmp_path, methods=[Shift])
    np.testing.assert_allclose(_logits(loaded), moved, atol=1e-5)
    with pytest.raises(ValueError, match=r"class 'Shift', which is not known.*methods="):
        flm.peft.load_adapter(one, tmp_path)


class Blend(flm.peft.Adapter):
    """Declares its options as attributes; one is inherited."""

    power: int = 2
    offset: keras.Variable  # has no default: not an option

    def make_weights(self, linear: flm.peft.Linear) -> None:
        self.rows = self.add_weight((linear.in_size, 1), "zeros", name="rows")

    def kernel_change(self) -> Any:
        return self.linear.kernel() * self.rows**self.power


class Louder(Blend):
    factor: float = 1.0

    def kernel_change(self) -> Any:
        return super().kernel_change() * self.factor


def test_options_are_attributes_with_a_default(one: Any, tmp_path: Path) -> None:
    powers = {"decoder_0/**": 1, "**": 3}
    model = flm.peft.attach(one, Louder, ["query", "up"], power=powers, dtype="float32")
    options = {path: x.get_options() for path, x in flm.select(model, Louder).items()}
    assert options == {
        f"decoder_{i}/{name}": {"power": (1, 3)[i], "factor": 1.0}
        for i in range(2)
        for name in ("attention/query", "mlp/up")
    }
    _move(model)
    flm.peft.save_adapter(model, tmp_path)
    loaded = flm.peft.load_adapter(one, tmp_path, methods=[Louder])
    np.testing.assert_allclose(_logits(loaded), _logits(model), atol=1e-5)
    (layer, *_) = flm.select(model, Louder).values()
    again = Louder.from_config(layer.get_config())
    assert again.get_options() == layer.get_options()
    assert Louder.power == 2
    with pytest.raises(ValueError, match="powr"):
        flm.peft.attach(one, Louder, "query", powr=3)
    with pytest.raises(ValueError, match=r"No pattern of `power` matches 'decoder_0/.*up'"):
        flm.peft.attach(one, Louder, ["query", "up"], power={"query": 3})


SIGNATURES = {
    "lora": "rank=8 alpha=16 targets=None dropout=0.0 rslora=False init='zeros' "
    "adapter_name='default' dtype='float32' seed=None",
    "dora": "rank=8 alpha=16 targets=None dropout=0.0 rslora=False adapter_name='default' "
    "dtype='float32' seed=None",
    "svf": "targets=('query', 'value') adapter_name='default' dtype='float32'",
    "ia3": "targets=('key', 'value', 'down') feedforward='down' adapter_name='default' "
    "dtype='float32'",
    "bitfit": "targets='all' adapter_name='default' dtype='float32'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_and_saved_options(one: Any, name: str) -> None:
    parameters = list(inspect.signature(getattr(flm.peft, name)).parameters.values())
    assert parameters[0].name == "model"
    assert SIGNATURES[name] == " ".join(f"{p.name}={p.default!r}" for p in parameters[1:])
    (layer, *_) = flm.select(getattr(flm.peft, name)(one), flm.peft.Adapter).values()
    low_rank = {"rank": 8, "alpha": 16, "dropout": 0.0, "rslora": False}
    expected: dict[str, dict[str, Any]] = {
        "lora": {**low_rank, "init": "zeros", "seed": None},
        "dora": {**low_rank, "seed": None},
        "ia3": {"scales_inputs": False},
    }
    assert list(layer.get_options().items()) == list(expected.get(name, {}).items())


# Layers of other kinds


@pytest.mark.parametrize(
    "equation", ["btd,dnh->btnh", "btnh,nhd->btd", "...d,df->...f", "ab,cb->ac"]
)
@pytest.mark.parametrize("name", METHODS)
def test_einsum_dense(equation: str, name: str, tmp_path: Path) -> None:
    shapes = {
        "btd,dnh->btnh": ((5, 6), (None, 3, 4)),
        "btnh,nhd->btd": ((5, 2, 3), (None, 7)),
        "...d,df->...f": ((5, 6), 4),
        "ab,cb->ac": ((6,), 4),
    }
    inputs, outputs = shapes[equation]
    x = keras.Input(inputs)
    layer = keras.layers.EinsumDense(
        equation, outputs, activation="tanh", bias_axes="d" if equation.endswith("td") else None
    )
    y = layer(x)
    model = keras.Model(x, keras.layers.Flatten()(y) if len(inputs) == 1 else y)
    model.trainable = False
    value = np.random.default_rng(0).normal(size=(2, *inputs)).astype("float32")
    method = {
        "ia3": lambda m: flm.peft.ia3(m, keras.layers.EinsumDense, []),
        "dora": lambda m: flm.peft.dora(m, 3, targets=keras.layers.EinsumDense),
        "pissa": lambda m: flm.peft.lora(m, 3, targets=keras.layers.EinsumDense, init="pissa"),
        "lora": lambda m: flm.peft.lora(m, 3, targets=keras.layers.EinsumDense, dropout=0.1),
        "svf": lambda m: flm.peft.svf(m, keras.layers.EinsumDense),
        "bitfit": lambda m: flm.peft.bitfit(m, keras.layers.EinsumDense),
    }[name]
    adapted = method(model)
    base = np.asarray(model(value))
    np.testing.assert_allclose(np.asarray(adapted(value)), base, atol=1e-5)
    _move(adapted)
    moved = np.asarray(adapted(value))
    assert np.abs(moved - base).max() > 1e-3
    merged = flm.peft.merge(adapted)
    np.testing.assert_allclose(np.asarray(merged(value)), moved, atol=1e-5)
    flm.peft.save_adapter(adapted, tmp_path)
    loaded = flm.peft.load_adapter(model, tmp_path)
    np.testing.assert_allclose(np.asarray(loaded(value)), moved, atol=1e-5)


def test_an_einsum_that_is_no_matrix_product() -> None:
    x = keras.Input((5, 3, 4))
    model = keras.Model(x, keras.layers.EinsumDense("btnh,nhd->btnd", (None, 3, 2), name="e")(x))
    with pytest.raises(ValueError, match="'e' .*no product with one matrix"):
        flm.peft.lora(model, 1, targets="e")


def test_adapters_over_bfloat16(one: Any, tmp_path: Path) -> None:
    flm.peft.save_adapter(METHODS["lora"](one), tmp_path)
    model = flm.rewire(one)  # a model of its own, whose layers become bfloat16
    backbone = flm.Backbone._build(families.FAMILIES["llama"], one.config, "bfloat16")
    for variable, exact in zip(backbone.variables, model.variables, strict=True):
        variable.assign(exact)
    for name, attach in METHODS.items():
        adapted = attach(backbone)
        assert {v.dtype for v in adapted.trainable_variables} == {"float32"}, name
        assert {v.dtype for v in backbone.variables} == {"bfloat16"}
        assert adapted(IDS).dtype == backbone(IDS).dtype
        difference = np.abs(_logits(adapted) - _logits(backbone)).max()
        assert difference <= (1e-5 if name != "dora" else 0.05), name
        _move(adapted)
        merged = flm.peft.merge(adapted)
        assert {v.dtype for v in merged.variables} == {"bfloat16"}
        exact = attach(one)
        for variable, value in zip(
            exact.trainable_variables, adapted.trainable_variables, strict=True
        ):
            variable.assign(value)
        assert np.abs(_logits(merged) - _logits(exact)).mean() < 0.05, name
        assert np.abs(_logits(adapted) - _logits(exact)).mean() < 0.05, name


def test_dropout_is_for_training_only(one: Any) -> None:
    model = flm.peft.lora(one, 4, dropout=0.5, seed=0)
    _move(model)
    np.testing.assert_array_equal(_logits(model), _logits(model))
    dropped = np.asarray(model(IDS, training=True))
    assert np.abs(dropped - _logits(model)).max() > 1e-3


def test_a_seed_gives_the_same_adapter_and_layers_differ(one: Any) -> None:
    first, second = (flm.peft.lora(one, 2, seed=5).trainable_variables for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(_array(a), _array(b))
    starts = [_array(v) for v in first if v.path.endswith("query/lora_a")]
    assert np.abs(starts[0] - starts[1]).max() > 0.01


def test_an_activation_comes_after_the_change() -> None:
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(3, activation="tanh", name="a")(x))
    model.trainable = False
    value = np.ones((1, 4), "float32")
    once = flm.peft.bitfit(model, "a", adapter_name="x")
    once.trainable = False  # a stock model cannot freeze for itself
    twice = flm.peft.bitfit(once, "a", adapter_name="y")
    for variable in twice.variables:
        if variable.shape == (3,) and variable is not model.get_layer("a").bias:
            variable.assign(np.full(3, 0.5, "float32"))
    expected = np.tanh(np.arctanh(np.asarray(model(value))) + 1)
    np.testing.assert_allclose(np.asarray(twice(value)), expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(flm.peft.merge(twice)(value)), expected, atol=1e-5)
    assert model.get_layer("a").activation is keras.activations.tanh


def test_training_the_merged_model_leaves_the_original(one: Any) -> None:
    backbone = flm.rewire(one)
    model = flm.peft.lora(backbone, 2, targets=["query", "value"])
    flm.peft.activate(model, None)  # nothing to fold: the same numbers in variables of their own
    merged = flm.peft.merge(model)
    layers = [flm.select(x, "decoder_0/attention/query") for x in (backbone, merged)]
    old, new = [x["decoder_0/attention/query"] for x in layers]
    for variable, other in zip(old.weights, new.weights, strict=True):
        np.testing.assert_array_equal(_array(variable), _array(other))
        assert variable.value.unsafe_buffer_pointer() != other.value.unsafe_buffer_pointer()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank from 1 to 48 for '.*query'.*48 x 48. Received: 0"),
        ({"rank": -3}, "Received: -3"),
        ({"rank": 49}, "rank from 1 to 48"),
        ({"rank": 25, "targets": "key"}, "rank from 1 to 24 for .*48 x 24"),
        ({"rank": 2.5}, "Received: 2.5"),
        ({"rank": {"query": 2}, "targets": "key"}, "No pattern of `rank` matches 'decoder_0/att"),
        ({"targets": "qery"}, "Near it: decoder_0/attention/query"),
        ({"targets": "final_norm"}, "Dense, EinsumDense or Embedding; .*only RMSNorm"),
        ({"init": "magic"}, "'zeros', 'pissa' or 'olora'"),
        ({"dropout": 1.0}, "dropout from 0"),
        ({"alpha": 0, "init": "pissa"}, "alpha above 0"),
    ],
)
def test_bad_options(one: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flm.peft.lora(one, **options)


def test_an_adapter_of_another_model(one: Any, tmp_path: Path) -> None:
    config = {**CONFIGS["llama_grouped"], "num_hidden_layers": 3, "intermediate_size": 64}
    save_reference(config, tmp_path / "other")
    other = flm.Backbone.from_preset(str(tmp_path / "other"))
    for name in ("lora", "svf"):
        flm.peft.save_adapter(METHODS[name](other), tmp_path / name)
        with pytest.raises(ValueError, match="does not fit the model") as raised:
            flm.peft.load_adapter(one, tmp_path / name)
        text = str(raised.value)
        missing = {"lora": "module 'model.layers.2.mlp.up_proj'", "svf": "'decoder_2/mlp/up'"}
        assert missing[name] in text
        assert "7 differences" in text
    flm.peft.save_adapter(flm.peft.lora(other, 2, targets=["decoder_[01]/mlp/*"]), tmp_path / "c")
    with pytest.raises(ValueError, match="6 differences") as raised:
        flm.peft.load_adapter(one, tmp_path / "c")
    assert r"'lora_a' expected shape (80, 2), received (64, 2)" in str(raised.value)
    assert _logits(one).shape == (2, 9, 128)


def test_damaged_folders(one: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json in .*not there"):
        flm.peft.load_adapter(one, tmp_path)
    flm.peft.save_adapter(METHODS["svf"](one), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = config.read_text()
    for text, message in (("{", "no valid JSON"), ("[]", "JSON object"), ("{}", "is None")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            flm.peft.load_adapter(one, tmp_path)
    config.write_text(json.dumps({**json.loads(good), "layers": {"decoder_0/mlp/up": {"x": 1}}}))
    with pytest.raises(ValueError, match="belongs to none of the layers"):
        flm.peft.load_adapter(one, tmp_path)
    config.write_text(good)
    data = weights.read_bytes()
    weights.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="safetensors"):
        flm.peft.load_adapter(one, tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        flm.peft.load_adapter(one, tmp_path)


def test_a_failed_save_keeps_the_old_file(
    one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = METHODS["ia3"](one)
    flm.peft.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _move(model)

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("functional_llm.peft.adapter_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        flm.peft.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_to_merge_or_unmerge(one: Any) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        flm.peft.merge(one)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        flm.peft.unmerge(one)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        flm.peft.unmerge(flm.peft.merge(METHODS["ia3"](one), keep=False))


# A real model


@pytest.mark.real
@pytest.mark.nightly  # by day, tiny models do
def test_smollm2_writes_the_same_merged_and_unmerged(smollm2_gguf: Path) -> None:
    path = str(smollm2_gguf)
    backbone, tokenizer = flm.Backbone.from_preset(path), flm.Tokenizer.from_preset(path)
    model = flm.peft.lora(backbone, seed=0)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape).astype("float32") * 0.02)
    prompts = ["The capital of France is", "Once upon a time"]
    texts = [
        flm.TextGenerator(one, tokenizer).generate(prompts, max_new_tokens=32)
        for one in (model, flm.peft.merge(model), backbone)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
