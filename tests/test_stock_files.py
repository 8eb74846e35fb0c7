"""What `Backbone.save` writes: stock Keras loads it on three backends, and nothing is lost."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import functional_llm as flm
from configs import CONFIGS, ONE_OF_EACH_KIND
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.hf_config import decode_config
from functional_llm.graph.equality import same_graph
from functional_llm.stock import lowering
from functional_llm.stock.keras_file import read_description
from functional_llm.stock.lowering import Lowering
from nightly import is_its_turn, is_night, one_backend_each, one_of_each_kind
from pair import TOKENS, Pair, compiled, random_tokens
from stock import BACKENDS, StockKeras, run_stock
from tiny import save_tiny

ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: flm.peft.lora(model, rank=3, targets="all"),
    "rslora_pissa": lambda model: flm.peft.lora(model, rank=3, rslora=True, init="pissa"),
    "dora": lambda model: flm.peft.dora(model, rank=2, targets=["query", "value", "down"]),
    "svf": flm.peft.svf,
    "ia3": flm.peft.ia3,
    "bitfit": flm.peft.bitfit,
    "lora_under_dora": lambda model: flm.peft.dora(
        flm.peft.lora(model, rank=2), rank=3, adapter_name="second"
    ),
}
ADAPTED = "qwen2_tied"  # it has biases
TRAINED_FULLY = "gpt2_tied"
# On all three backends; the others take turns, and `make nightly` takes all.
EVERYWHERE = ("lora", "int4")
# The config, the mode, and the layers.
QUANTIZED: dict[str, tuple[str, str, Any]] = {
    "int8": (ADAPTED, "int8", None),
    "int8_soft_caps": ("gemma2_soft_caps", "int8", None),
    "int4": (ADAPTED, "int4/4", None),
    "int4_embeddings": ("gpt2_tied", "int4/4", [keras.layers.Dense, keras.layers.Embedding]),
}
EDITS = [*ADAPTERS, *QUANTIZED]


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return random_tokens(*shape, seed=seed) % 100


def _with_noise(model: Any, seed: int = 1) -> Any:
    """Adapters begin without an effect: gives them one."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(variable + random.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def _has_its_turn(parameters: Mapping[str, Any]) -> bool:
    name, backend = parameters["name"], parameters["backend"]
    place = BACKENDS.index(backend)
    return name in EVERYWHERE or is_its_turn(EDITS.index(name), place, len(BACKENDS))


_in_turn = pytest.mark.nightly(unless=_has_its_turn)


class StockFile:
    """A saved model beside the logits that it gives, for plain Keras on three backends to load.

    Args:
        model: What to save.
        path: Where to.
        logits: What the model makes of TOKENS.
        training: How plain Keras is to train it: "", "briefly" or "fully".
        processes: Backend -> who measures.
    """

    def __init__(
        self,
        model: Any,
        path: Path,
        logits: np.ndarray,
        training: str,
        processes: dict[str, StockKeras],
    ) -> None:
        self.model, self.path, self.logits, self._processes = model, path, logits, processes
        model.save(path)
        np.savez(path.with_suffix(".npz"), token_ids=TOKENS, logits=logits, training=training)

    def measured(self, backend: str) -> dict[str, Any]:
        """Returns what the backend's process finds out, at the first call."""
        return self._processes[backend].result(self.path)


@pytest.fixture(scope="session")
def stock_file(
    request: pytest.FixtureRequest,
    pair: Pair,
    stock_keras: dict[str, StockKeras],
    tmp_path_factory: pytest.TempPathFactory,
) -> StockFile:
    """One of each config that has one."""
    if CONFIGS[pair.name]["model_type"] in ("mamba", "rwkv7"):
        with pytest.raises(ValueError, match="no form in built-in layers.*save_preset"):
            pair.ours.save(tmp_path_factory.mktemp("stock") / "model.keras")
        pytest.skip("goes from token to token in a loop")
    path = tmp_path_factory.mktemp("stock") / "model.keras"
    trains = pair.name in ONE_OF_EACH_KIND or is_night(request.config)
    training = "fully" if pair.name == TRAINED_FULLY else "briefly" if trains else ""
    return StockFile(pair.ours, path, pair.logits, training, stock_keras)


@pytest.fixture(scope="module")
def edited_files(
    checkpoint: Callable[[str], Path],
    stock_keras: dict[str, StockKeras],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, StockFile]:
    """One of each method, and of quantised models."""
    base = flm.Backbone.from_preset(checkpoint(ADAPTED))
    models = {name: _with_noise(make(base)) for name, make in ADAPTERS.items()}
    for name, (original, mode, where) in QUANTIZED.items():
        models[name] = flm.quantize(flm.Backbone.from_preset(checkpoint(original)), mode, where)
    folder = tmp_path_factory.mktemp("stock")
    training = dict.fromkeys(QUANTIZED, "") | dict.fromkeys(ADAPTERS, "briefly") | {"lora": "fully"}
    return {
        name: StockFile(
            model, folder / f"{name}.keras", compiled(model)(TOKENS), training[name], stock_keras
        )
        for name, model in models.items()
    }


def test_the_library_is_not_there() -> None:
    with pytest.raises(AssertionError, match="No module named 'functional_llm'"):
        run_stock("jax", "-c", "import functional_llm")


def _assert_the_same(found: dict[str, Any]) -> None:
    assert found["logits"] < 1e-4
    assert found["decoded"] < 1e-4
    own = ["cache", "cache_length", "token_ids"]
    assert found["inputs"] in (own, sorted([*own, "new_length", "state"]))


@one_backend_each
@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_keras_computes_the_same(stock_file: StockFile, backend: str) -> None:
    _assert_the_same(stock_file.measured(backend))


@_in_turn
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_keras_computes_the_same_when_edited(
    edited_files: dict[str, StockFile], backend: str, name: str
) -> None:
    _assert_the_same(edited_files[name].measured(backend))


def _assert_trained(found: dict[str, Any]) -> None:
    assert found["losses"][-1] < found["losses"][0] - 1e-4
    assert found["changed"] > 0
    assert found["frozen_changed"] == 0


@one_backend_each
@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_keras_trains(stock_file: StockFile, backend: str) -> None:
    found = stock_file.measured(backend)
    _assert_trained(found)
    assert found["frozen"] == len(stock_file.model.non_trainable_variables)  # xIELU's numbers


@pytest.mark.parametrize("pair", [TRAINED_FULLY], indirect=True)
@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(x, marks=pytest.mark.nightly) for x in BACKENDS[1:])]
)
def test_stock_keras_saves_what_it_trained(stock_file: StockFile, backend: str) -> None:
    assert stock_file.measured(backend)["again"] < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_keras_saves_an_adapter_that_it_trained(
    edited_files: dict[str, StockFile], backend: str
) -> None:
    assert edited_files["lora"].measured(backend)["again"] < 1e-4


@_in_turn
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_keras_trains_adapters(
    edited_files: dict[str, StockFile], backend: str, name: str
) -> None:
    found = edited_files[name].measured(backend)
    _assert_trained(found)
    assert found["frozen"] > 0


def _modules(config: Any) -> Any:
    """Yields the names in every field that says which code to run."""
    if isinstance(config, dict):
        for key in ("module", "registered_name", "class_name"):
            if config.get(key) is not None:
                yield config[key]
        for value in config.values():
            yield from _modules(value)
    elif isinstance(config, list):
        for value in config:
            yield from _modules(value)


def _assert_only_keras(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = ["config.json", "metadata.json", "model.weights.h5"]
        assert sorted(archive.namelist()) == members
        text = archive.read("config.json").decode() + archive.read("metadata.json").decode()
        config = json.loads(archive.read("config.json"))
    assert "functional_llm" not in text
    names = set(_modules(config))
    assert {name for name in names if "." in name and not name.startswith("keras.")} == set()
    assert not names & {"Lambda", "function", "__lambda__", "CompositeLayer", "Backbone"}
    assert "Functional" in names


@one_of_each_kind
def test_no_file_names_code_that_is_not_keras(stock_file: StockFile) -> None:
    _assert_only_keras(stock_file.path)


def test_no_edited_file_names_code_that_is_not_keras(edited_files: dict[str, StockFile]) -> None:
    for file in edited_files.values():
        _assert_only_keras(file.path)


@one_of_each_kind
def test_the_config_comes_back(pair: Pair, stock_file: StockFile) -> None:
    """And with it the graph, which is a function of it: the file is not of an edited one."""
    description = read_description(stock_file.path)
    assert description["family"] == CONFIGS[pair.name]["model_type"]
    family = FAMILIES[description["family"]]
    assert decode_config(description["config"], family) == pair.ours.config
    assert not description["edited"]


def _assert_came_back(file: StockFile) -> Any:
    """Returns what came back: with the same graph and weights, so with the same logits."""
    model, original = flm.Backbone.from_preset(file.path), file.model
    assert type(model) is flm.Backbone
    assert model.config == original.config
    assert same_graph(model, original)
    assert [v.path for v in model.variables] == [v.path for v in original.variables]
    names = [v.path for v in original.trainable_variables]
    assert [v.path for v in model.trainable_variables] == names
    for received, expected in zip(model.variables, original.variables, strict=True):
        np.testing.assert_array_equal(received.value, expected.value)
    return model


@one_of_each_kind
def test_the_way_back(stock_file: StockFile) -> None:
    _assert_came_back(stock_file)


@pytest.mark.parametrize("name", EDITS)
def test_the_way_back_of_edited_ones(edited_files: dict[str, StockFile], name: str) -> None:
    model = _assert_came_back(edited_files[name])
    np.testing.assert_allclose(compiled(model)(TOKENS), edited_files[name].logits, atol=1e-5)


def test_what_came_back_generates(edited_files: dict[str, StockFile]) -> None:
    model = flm.Backbone.from_preset(edited_files["lora"].path)
    prompt = [_tokens(5).tolist()]
    (new,) = flm.TextGenerator(model).generate_ids(prompt, max_new_tokens=3)
    logits = compiled(model)(np.array([prompt[0] + new], "int32"))
    assert new == logits[0, 4:-1].argmax(-1).tolist()


def test_inactive_adapters_stay_so(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = flm.Backbone.from_preset(checkpoint("llama_grouped"))
    both = flm.peft.ia3(flm.peft.lora(base, rank=2), adapter_name="other")
    _with_noise(both)
    flm.peft.activate(both, "other")
    both.save(tmp_path / "both.keras")
    token_ids = _tokens(2, 7)
    expected = both(token_ids)
    loaded = keras.saving.load_model(tmp_path / "both.keras")
    np.testing.assert_allclose(loaded(token_ids), expected, atol=1e-5)
    again = flm.Backbone.from_preset(tmp_path / "both.keras")
    np.testing.assert_allclose(again(token_ids), expected, atol=1e-5)
    flm.peft.activate(again, ["default", "other"])
    flm.peft.activate(both, ["default", "other"])
    np.testing.assert_allclose(again(token_ids), both(token_ids), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.nightly)])
def test_half_the_size(checkpoint: Callable[[str], Path], tmp_path: Path, dtype: str) -> None:
    full = tmp_path / "full.keras"
    flm.Backbone.from_preset(checkpoint("gemma2_soft_caps")).save(full)
    model = flm.Backbone.from_preset(full, dtype=dtype)
    assert {v.dtype for v in model.variables} == {dtype}
    model.save(tmp_path / "half.keras")
    size = sum(2 * v.value.size for v in model.variables)
    with zipfile.ZipFile(tmp_path / "half.keras") as archive:
        stored = archive.getinfo("model.weights.h5").file_size
    with zipfile.ZipFile(full) as archive:
        assert archive.getinfo("model.weights.h5").file_size - stored == pytest.approx(size, 0.02)
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    assert {v.dtype for v in loaded.variables} == {dtype}
    token_ids = _tokens(2, 300)  # beyond the integers that bfloat16 can tell apart
    expected = np.asarray(ops.cast(model(token_ids), "float32"))
    received = np.asarray(ops.cast(loaded(token_ids), "float32"))
    np.testing.assert_allclose(received, expected, atol=1e-5)
    again = flm.Backbone.from_preset(tmp_path / "half.keras", dtype=dtype)
    np.testing.assert_array_equal(np.asarray(again(token_ids)), np.asarray(model(token_ids)))


def test_files_beyond_the_limits_of_old_zips(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 4 GiB a zip counts with 64 bits: here from the first kilobyte on."""
    model = flm.Backbone.from_preset(checkpoint("gpt2_tied"))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    model.save(tmp_path / "large.keras")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "large.keras") as archive:
        assert archive.getinfo("model.weights.h5").extract_version >= zipfile.ZIP64_VERSION
    token_ids = _tokens(1, 6)
    loaded = keras.saving.load_model(tmp_path / "large.keras")
    np.testing.assert_allclose(loaded(token_ids), model(token_ids), atol=1e-5)


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    backbone, tokenizer = flm.Backbone.from_preset(folder), flm.Tokenizer.from_preset(folder)
    path = tmp_path / "model.keras"
    backbone.save(path)
    again = flm.Tokenizer.from_preset(path)
    assert again.encode("a word, and 12") == tokenizer.encode("a word, and 12")
    assert again.chat_template == tokenizer.chat_template
    assert again.stop_token_ids == tokenizer.stop_token_ids
    keras.saving.load_model(path)
    second = flm.Backbone.from_preset(path)
    second.save(path)  # over the file that it came from
    flm.Tokenizer.from_preset(path)
    second.save_preset(tmp_path / "directory")
    flm.Tokenizer.from_preset(tmp_path / "directory")
    second.preset = None
    second.save(path, tokenizer=tokenizer)
    assert flm.Tokenizer.from_preset(path).encode("12 words") == tokenizer.encode("12 words")


@keras.saving.register_keras_serializable("tests")
class Loud(keras.layers.Layer):
    """A user's layer, with a weight of each shape."""

    def __init__(self, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape: Any) -> None:
        size = input_shape[-1]
        self.gain = self.add_weight((), "ones", name="gain")
        self.bias = self.add_weight((size,), "ones", name="bias")
        self.mixing = self.add_weight((size, 2, size // 2), "orthogonal", name="mixing")

    def call(self, x: Any) -> Any:
        matrix = ops.reshape(self.mixing, (x.shape[-1], x.shape[-1]))
        return ops.matmul(x, matrix) * self.factor * self.gain + self.bias


def _louder(backbone: Any) -> Any:
    loud = Loud(name="loud")

    def call(layer: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return loud(layer(*args, **kwargs))

    return flm.rewire(backbone, call=call, where="decoder_0/mlp")


def test_a_layer_of_a_users_own(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _louder(flm.Backbone.from_preset(checkpoint("llama_grouped")))
    path = tmp_path / "loud.keras"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"'decoder_0/loud' is a Loud.*register_lowering\(Loud"):
        model.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(lowering, "_LOWERINGS", dict(lowering._LOWERINGS))
    flm.register_lowering(Loud, Loud.call)
    model.save(path)
    loaded, token_ids = keras.saving.load_model(path), _tokens(2, 8)
    np.testing.assert_allclose(loaded(token_ids), model(token_ids), atol=1e-5)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    loaded.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loaded.fit(token_ids, token_ids, verbose=0)
    loaded.save(path)
    with pytest.raises(ValueError, match="load_weights"):  # stock Keras has written it
        flm.Backbone.from_preset(path)
    other = _louder(flm.Backbone.from_preset(checkpoint("llama_grouped"), load_weights=False))
    other.load_weights(path)
    np.testing.assert_allclose(other(token_ids), loaded(token_ids), atol=1e-5)


def test_what_is_edited_does_not_come_back_as_if_it_were_not(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = flm.Backbone.from_preset(checkpoint("mistral_window"))

    def twice(layer: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs) * 2

    model = flm.rewire(backbone, call=twice, where="decoder_1/mlp")
    model.save(tmp_path / "twice.keras")
    token_ids = _tokens(2, 12)
    loaded = keras.saving.load_model(tmp_path / "twice.keras")
    np.testing.assert_allclose(loaded(token_ids), model(token_ids), atol=1e-5)
    assert np.abs(loaded(token_ids) - backbone(token_ids)).max() > 1e-2
    with pytest.raises(ValueError, match="was rewired"):
        flm.Backbone.from_preset(tmp_path / "twice.keras")
    with pytest.raises(ValueError, match="was rewired"):
        model.save_preset(tmp_path / "directory")
    backbone.load_weights(tmp_path / "twice.keras")  # the graph's own weights are the same


def test_a_lambda_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = flm.Backbone.from_preset(checkpoint("llama_grouped"))
    double = keras.layers.Lambda(lambda x: x * 2, name="double")

    def call(layer: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return double(layer(*args, **kwargs))

    model = flm.rewire(backbone, call=call, where="decoder_0/mlp")
    with pytest.raises(ValueError, match="'decoder_0/double' is a Lambda"):
        model.save(tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []


def test_an_activation_of_a_users_own_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    @keras.saving.register_keras_serializable("tests")
    def odd(x: Any) -> Any:
        return x * ops.sigmoid(2 * x)

    def replace(layer: Any, path: str) -> Any:
        new = keras.layers.Dense(layer.units, use_bias=False, activation=odd, name=layer.name)
        new.build((None, layer.kernel.shape[0]))
        return new

    backbone = flm.Backbone.from_preset(checkpoint("llama_grouped"))
    model = flm.rewire(backbone, replace, where="decoder_1/mlp/gate")
    with pytest.raises(ValueError, match="decoder_1_mlp_gate.*odd"):
        model.save(tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_in_two_places_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = flm.Backbone.from_preset(checkpoint("llama_grouped"))
    shared = flm.select(backbone, "decoder_0/mlp/up")["decoder_0/mlp/up"]
    model = flm.rewire(backbone, lambda layer, path: shared, where="decoder_1/mlp/up")
    with pytest.raises(ValueError, match="'up' is used inside 'mlp' and inside 'mlp'"):
        model.save(tmp_path / "model.keras")


def test_bad_places_and_damaged_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = flm.Backbone.from_preset(checkpoint("gpt2_one_layer_one_head"))
    whole = tmp_path / "whole.keras"
    model.save(whole)
    for name in ("model", "model.h5", "model.weights.h5"):
        with pytest.raises(ValueError, match="ends in .keras"):
            model.save(tmp_path / name)
    with pytest.raises(FileExistsError, match="overwrite"):
        model.save(whole, overwrite=False)
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        flm.Backbone.from_preset(tmp_path / "none.keras")
    content = whole.read_bytes()
    at = content.index(b"\x89HDF") + 5000
    damaged = {
        "empty": b"",
        "text": b"no zip at all",
        "cut": content[: len(content) // 2],
        "flipped": content[:at]
        + bytes(255 - x for x in content[at : at + 64])
        + content[at + 64 :],
    }
    for name, data in damaged.items():
        path = tmp_path / f"{name}.keras"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.keras is damaged"):
            flm.Backbone.from_preset(path)
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "[1, 2]")
    with pytest.raises(ValueError, match="damaged"):
        flm.Backbone.from_preset(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="no tokenizer"):
        flm.Tokenizer.from_preset(whole)


def test_a_failing_disk_leaves_the_file_before(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flm.Backbone.from_preset(checkpoint("gpt2_one_layer_one_head"))
    path = tmp_path / "model.keras"
    model.save(path)
    before = path.read_bytes()

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_private_keras_is_as_expected(checkpoint: Callable[[str], Path]) -> None:
    """What `export` relies on: a config says whether a shared copy trains, not its weights."""
    model = flm.peft.lora(flm.Backbone.from_preset(checkpoint("llama_grouped")), rank=2)
    text = Lowering(model).model.to_json()
    assert re.search(r'"name": "decoder_0_mlp_up", "trainable": false', text)
    assert re.search(r'"name": "decoder_0_attention_query_lora_a", "trainable": true', text)
    assert flm.select(model, "decoder_0/mlp/up")["decoder_0/mlp/up"].kernel.trainable
