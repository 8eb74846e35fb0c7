"""int8 and int4 as a rewiring."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from keras import ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.edits.quantization import quantized_modes
from functional_llm.edits.quantized_layers import dequantized
from functional_llm.edits.rounding import round_to_int4, round_to_int4_with_zeros
from functional_llm.formats.grid import Grid
from functional_llm.kernels.int4 import multiply_int4
from functional_llm.layers.experts import ExpertDense
from functional_llm.peft.adapter import find_adapters
from nightly import FAMILIES_AND_KINDS, one_of_each_kind, one_of_each_layout
from reference import make_reference, save_reference
from tiny import save_tokenizer
from tiny_gguf import save_gguf

# With a head and without one, with biases and without.
EVERYTHING = [keras.layers.Dense, keras.layers.Embedding]
some_families = pytest.mark.parametrize(
    "folder", ["llama_grouped", "gemma2_soft_caps", "gpt2_tied"], indirect=True
)


# By day, a mode of each.
_IN_TURN = {("llama_grouped", "int8"), ("gpt2_tied", "int4/4"), ("gpt2_tied", "int4/2")}
in_turn = pytest.mark.nightly(unless=lambda x: (x["folder"], x["mode"]) in _IN_TURN)


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype("int32")


def _logits(model: Any, token_ids: np.ndarray) -> np.ndarray:
    trained = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    program = jax.jit(lambda inputs: model.stateless_call(trained, others, inputs)[0])
    return np.asarray(program(token_ids).astype("float32"))


@pytest.fixture(scope="module", params=FAMILIES_AND_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_reference(CONFIGS[request.param], path)
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return flm.Backbone.from_preset(folder)


def _takes_groups_of_4(model: Any) -> bool:
    """Whether all inputs of a tiny model's matrices come in groups of four."""
    dense = [x for _, x in flm.walk(model) if type(x) is keras.layers.Dense]
    return all(layer.kernel.shape[0] % 4 == 0 for layer in dense)


@one_of_each_layout
def test_matrices_take_a_byte_a_number_and_logits_stay_near(backbone: Any) -> None:
    token_ids, before = _tokens(2, 12), [v.path for v in backbone.variables]
    expected = _logits(backbone, token_ids)
    quantized = flm.quantize(backbone)
    assert type(quantized) is type(backbone)
    others = ("scale", "gamma", "beta", "bias")  # of norms and experts, one a head or an expert
    matrices = [v for v in quantized.variables if len(v.shape) == 2 and v.name not in others]
    stay = ("router/kernel", "convolution/kernel", "scan/a_log")
    matrices = [v for v in matrices if not v.path.endswith(stay)]
    assert {v.dtype for v in matrices} == {"int8"}
    assert not any(v.trainable for v in matrices)
    received = _logits(quantized, token_ids)
    error = np.abs(received - expected)
    assert 0 < error.mean() < 0.05 * expected.std()
    assert [v.path for v in backbone.variables] == before
    np.testing.assert_array_equal(_logits(backbone, token_ids), expected)


@pytest.mark.nightly(unless=lambda x: x["folder"] in ("gpt2_tied", "qwen3_moe_some_dense"))
def test_int4_takes_half_a_byte_a_number_and_is_what_stock_keras_makes_of_it(
    backbone: Any, tmp_path: Path
) -> None:
    if not _takes_groups_of_4(backbone):
        return
    token_ids, plain = _tokens(2, 12), {v.path: v for v in backbone.variables}
    expected = _logits(backbone, token_ids)
    quantized = flm.quantize(backbone, "int4/4", where=EVERYTHING)
    assert set(quantized_modes(quantized).values()) == {"int4/4"}
    packed = [v for v in quantized.variables if v.path in plain and v.dtype == "int8"]
    assert len(packed) == len(quantized_modes(quantized))
    for variable in packed:
        *first, last = plain[variable.path].shape
        assert tuple(variable.shape) == (*first, -(-last // 2))
    assert not any(v.trainable for v in quantized.variables if v.path not in plain)
    received = _logits(quantized, token_ids)
    error = np.abs(received - expected)
    assert 0 < error.mean() < 0.3 * expected.std()
    quantized.save(tmp_path / "model.keras")
    stock = keras.saving.load_model(tmp_path / "model.keras")
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(_logits(stock, token_ids), received, atol=1e-4)
    again = flm.Backbone.from_preset(tmp_path / "model.keras")
    assert quantized_modes(again) == quantized_modes(quantized)
    for new, old in zip(again.variables, quantized.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(old))


@one_of_each_kind
def test_int4_leaves_what_is_of_tokens_in_int8(backbone: Any) -> None:
    """And what is of experts, and what is int8 already."""
    if not _takes_groups_of_4(backbone):
        return
    modes = quantized_modes(flm.quantize(backbone, "int4/4"))
    assert {path for path, mode in modes.items() if mode == "int8"} == {
        path
        for path, layer in flm.walk(backbone)
        if isinstance(layer, keras.layers.Embedding | ExpertDense) or path == "head"
    }
    assert set(modes.values()) == {"int8", "int4/4"}
    first = quantized_modes(flm.quantize(backbone, "int8", where="decoder_0/**"))
    both = flm.quantize(flm.quantize(backbone, "int8", where="decoder_0/**"), "int4/4")
    assert quantized_modes(both) == modes | first


@in_turn
@some_families
@pytest.mark.parametrize("mode", ["int8", "int4/4"])
def test_generation_with_the_cache_is_what_the_whole_text_gives(backbone: Any, mode: str) -> None:
    quantized = flm.quantize(backbone, mode)
    prompts = [_tokens(6).tolist(), _tokens(9, seed=1).tolist()]
    rows = flm.TextGenerator(quantized).generate_ids(prompts, max_new_tokens=5)
    for prompt, new in zip(prompts, rows, strict=True):
        logits = _logits(quantized, np.array([prompt + new], "int32"))[0]
        chosen = logits[len(prompt) - 1 : -1]
        assert (chosen.max(-1) - chosen[np.arange(5), new] < 1e-3).all()


@in_turn
@some_families
@pytest.mark.parametrize("mode", ["int8", "int4/4"])
def test_lora_on_top_trains_and_travels_in_a_stock_file(
    backbone: Any, mode: str, tmp_path: Path
) -> None:
    quantized = flm.quantize(backbone, mode)
    before = [ops.convert_to_numpy(v) for v in quantized.variables]
    model = flm.peft.lora(quantized, rank=2, seed=0)
    token_ids = _tokens(3, 9)
    np.testing.assert_allclose(_logits(model, token_ids), _logits(quantized, token_ids), atol=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    losses = model.fit(token_ids[:, :-1], token_ids[:, 1:], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.05
    assert {v.path.rpartition("/")[2] for v in model.trainable_variables} == {"lora_a", "lora_b"}
    for variable, value in zip(quantized.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    expected = _logits(model, token_ids)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("decoder").get_layer("token_embedding")) in (
        keras.layers.ReversibleEmbedding,
    )
    with jax.numpy_dtype_promotion("standard"):  # stock layers multiply float32 by int8
        np.testing.assert_allclose(_logits(loaded, token_ids), expected, atol=1e-4)
    again = flm.Backbone.from_preset(tmp_path / "model.keras")
    np.testing.assert_allclose(_logits(again, token_ids), expected, atol=1e-5)
    flm.peft.save_adapter(model, tmp_path / "adapter")
    loaded_on = flm.peft.load_adapter(quantized, tmp_path / "adapter")
    np.testing.assert_allclose(_logits(loaded_on, token_ids), expected, atol=1e-5)
    merged = flm.peft.merge(model)
    assert np.abs(_logits(merged, token_ids) - expected).mean() < 0.05 * expected.std()
    with pytest.raises(ValueError, match=r"holds no integers. Received .* save the adapter"):
        merged.save_preset(tmp_path / "directory")


@pytest.mark.parametrize("folder", ["llama_grouped"], indirect=True)
def test_what_is_decomposed_comes_back_from_a_stock_file(backbone: Any, tmp_path: Path) -> None:
    """The adapters are there before the scales of their layers are read."""
    quantized = flm.quantize(backbone, "int8")
    model = flm.peft.lora(flm.peft.svf(quantized, adapter_name="svf"), rank=2, init="pissa")
    for _, adapter in find_adapters(model):
        for variable in adapter.adapter_weights.values():
            variable.assign_add(ops.full(variable.shape, 0.01))
    model.save(tmp_path / "model.keras")
    again = flm.Backbone.from_preset(tmp_path / "model.keras")
    token_ids = _tokens(2, 5)
    np.testing.assert_array_equal(_logits(again, token_ids), _logits(model, token_ids))


@in_turn
@some_families
@pytest.mark.parametrize(("mode", "least"), [("int8", 0.98), ("int4/2", 0.9)])
def test_gradients_pass_what_is_rounded(backbone: Any, mode: str, least: float) -> None:
    token_ids = _tokens(1, 7)

    def gradient(model: Any) -> np.ndarray:
        adapted = flm.peft.lora(model, rank=2, seed=0, targets="query")
        _, b = (adapted.trainable_variables[i] for i in (0, 1))
        trained = [v.value for v in adapted.trainable_variables]
        others = [v.value for v in adapted.non_trainable_variables]

        def loss(values: Any) -> Any:
            logits = adapted.stateless_call(values, others, token_ids)[0].astype("float32")
            return jax.nn.logsumexp(logits, axis=-1).mean() - logits[..., 3].mean()

        return np.asarray(jax.jit(jax.grad(loss))(trained)[1]).ravel()

    plain, quantized = gradient(backbone), gradient(flm.quantize(backbone, mode))
    cosine = plain @ quantized / np.linalg.norm(plain) / np.linalg.norm(quantized)
    assert cosine > least


@pytest.mark.parametrize("take", [lambda fn: fn, jax.grad])
def test_one_matrix_of_int4_is_in_floats_at_a_time(take: Any) -> None:
    size, count = 256, 10
    matrix = jnp.zeros((size, size // 2), "int8"), *jnp.ones((2, size // 32, size), "float16")

    def loss(x: Any, matrices: Any) -> Any:
        for matrix in matrices:
            x = jnp.tanh(multiply_int4(x, *matrix))
        return x.sum()

    program = jax.jit(take(loss)).lower(jnp.ones((8, size)), [matrix] * count).compile()
    floats = 4 * size * size
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 3 * floats  # of ten


def test_a_large_input_leaves_the_others_their_bits() -> None:
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(4, 64)), rng.normal(size=(64, 32)).astype("float32")
    x[:, 5] *= 300
    inputs = keras.Input((64,))
    dense = keras.layers.Dense(32, use_bias=True, bias_initializer="ones")
    model = keras.Model(inputs, dense(inputs))
    dense.kernel.assign(kernel)
    stock = keras.models.clone_model(model)
    stock.set_weights(model.get_weights())
    stock.layers[1].quantize("int8")
    quantized = flm.quantize(model)
    # The matrix as it is in int8, and the inputs as they are.
    scale = 127 / np.abs(kernel).max(axis=0)
    expected = x @ (np.round(kernel * scale) / scale) + 1
    error, stock_error = (
        np.abs(np.asarray(m(x.astype("float32"))) - expected).max() for m in (quantized, stock)
    )
    assert error < 0.02 * stock_error


@one_of_each_layout
def test_to_load_quantised_is_to_quantise_what_is_loaded(folder: Path, backbone: Any) -> None:
    for mode in ("int8", "int4/4") if _takes_groups_of_4(backbone) else ("int8",):
        expected = flm.quantize(backbone, mode)
        received = flm.Backbone.from_preset(folder, quantize=mode)
        assert quantized_modes(received) == quantized_modes(expected)
        for new, old in zip(received.variables, expected.variables, strict=True):
            assert (new.path, new.dtype, new.trainable) == (old.path, old.dtype, old.trainable)
            np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(old))


def _numbers(grid: Grid, size: int = 32) -> np.ndarray:
    groups = grid.integers.reshape(len(grid.scale), size, -1).astype("float32") + 8
    scale, offset = (x[:, None].astype("float32") for x in (grid.scale, grid.offset))
    return (groups * scale + offset).reshape(grid.integers.shape)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_what_llama_cpp_has_rounded_comes_out_exactly(kind: Kind) -> None:
    matrix = np.random.default_rng(0).normal(size=(50, 128)).astype("float32")
    rounded = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind).T
    grid = round_to_int4(rounded, 32)
    assert grid.integers.min() == -8 and grid.integers.max() == 7
    np.testing.assert_array_equal(_numbers(grid), rounded)


def test_grids_are_nearer_than_those_of_keras_and_leave_small_numbers_small() -> None:
    rng = np.random.default_rng(1)
    matrix = (rng.normal(size=(64, 40)) + 2 * rng.normal(size=40)).astype("float32")
    matrix[:, 0], matrix[:, 1] = 0, 3  # one number only
    matrix[::7, :20] = 0

    def error(received: Any) -> float:
        return float(np.square(received - matrix).sum())

    received = _numbers(round_to_int4(matrix, 32))
    integers, scales, zeros = round_to_int4_with_zeros(matrix, 32)
    steps = integers.reshape(2, 32, 40) - zeros[:, None].astype("float32")
    with_zeros = (steps * scales[:, None]).reshape(64, 40)
    stock = keras.quantizers.abs_max_quantize_grouped_with_zero_point(matrix, 32, to_numpy=True)
    grouped = np.asarray(stock[0], "float32").reshape(2, 32, 40) - np.asarray(stock[2])[:, None]
    of_keras = (grouped * np.asarray(stock[1])[:, None]).reshape(64, 40)
    assert error(with_zeros) < 0.5 * error(of_keras)
    assert error(received) < 1.01 * error(with_zeros)
    np.testing.assert_allclose(received[:, 2:], with_zeros[:, 2:], atol=0.01)
    np.testing.assert_allclose(received[:, :2], matrix[:, :2], atol=0.003)
    np.testing.assert_allclose(received[::7, 3:20], 0, atol=0.01)


def _random_blocks(shape: tuple[int, ...]) -> np.ndarray:
    """Q4_K, which the gguf package does not write: all bits at random, but for two scales."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144)).astype("uint8")
    raw[..., :4] = rng.uniform(0.001, 0.002, (*raw.shape[:-1], 2)).astype("<f2").view("uint8")
    return raw.reshape(*shape[:-1], -1)


@pytest.mark.parametrize(
    ("kind", "mode", "most"),
    [
        (Kind.Q4_0, "int4", 0),
        (Kind.Q4_1, "int4", 0),
        (Kind.Q4_K, "int4", 1e-3),
        (Kind.Q8_0, "int8", 0.02),
        (Kind.Q8_0, "int4", 0.1),
    ],
)
def test_matrices_of_a_gguf_file(
    kind: Kind, mode: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    config = {**CONFIGS["llama_grouped"], **sizes}
    tokenizer = flm.Tokenizer.from_preset(tmp_path)
    model = make_reference({**config, "vocab_size": tokenizer.vocabulary_size})
    path = tmp_path / "tiny.gguf"
    if kind == Kind.Q4_K:
        quantize = gguf.quants.quantize
        monkeypatch.setattr(
            "tiny_gguf.quantize",
            lambda x, to: _random_blocks(x.shape) if to == kind else quantize(x, to),
        )
    save_gguf(model, tmp_path / "tokenizer.json", path, kind)
    plain = flm.Backbone.from_preset(path)
    made: list[int] = []

    def round_seen(matrix: np.ndarray, size: int) -> Grid:
        made.append(size)
        return round_to_int4(matrix, size)

    monkeypatch.setattr("functional_llm.edits.quantized_layers.round_to_int4", round_seen)
    quantized = flm.Backbone.from_preset(path, quantize=mode)
    layers = flm.select(quantized, keras.layers.Dense)
    for name, layer in flm.select(plain, keras.layers.Dense).items():
        if name == "head":  # int8
            continue
        expected = ops.convert_to_numpy(layer.kernel)
        received = ops.convert_to_numpy(dequantized(layers[name], "kernel"))
        assert np.abs(received - expected).mean() <= most * expected.std()
    assert len(made) == (7 if (kind, mode) == (Kind.Q8_0, "int4") else 0)  # no floats to round


@pytest.mark.real
@pytest.mark.nightly  # by day, the logits of tiny models stay near
def test_perplexity_of_a_real_text(smollm2_gguf: Path, repository: Path) -> None:
    text = (repository / "LICENSE").read_text()  # which nobody edits
    ids = flm.Tokenizer.from_preset(str(smollm2_gguf)).encode(text)
    rows = np.array(ids[: len(ids) // 300 * 300]).reshape(-1, 300)
    backbone = flm.Backbone.from_preset(str(smollm2_gguf))

    def loss(model: Any) -> float:
        wrapped = flm.training.LossModel(model)
        wrapped.compile("sgd")
        logs = wrapped.evaluate(rows[:, :-1], rows[:, 1:], verbose=0, return_dict=True)
        return logs["token_loss"]

    assert len(rows) > 6
    assert abs(loss(flm.quantize(backbone)) - loss(backbone)) < np.log(1.01)


@pytest.mark.parametrize("folder", ["llama_grouped"], indirect=True)
def test_bad_requests(folder: Path, backbone: Any) -> None:
    modes: Any = ("int3", "int4/0", "int4/3", "int4/", "int4/-1", "int8/32", 4, None)
    for mode in modes:
        with pytest.raises(ValueError, match="Expected mode 'int8', 'int4', or 'int4/64'"):
            flm.quantize(backbone, mode)
    with pytest.raises(ValueError, match=r"divide the inputs .* of 32, but 'decoder_0/.*' has 48"):
        flm.quantize(backbone, "int4")
    with pytest.raises(ValueError, match="divide the inputs"):
        flm.Backbone.from_preset(folder, quantize="int4")
    with pytest.raises(ValueError, match="not quantised yet"):
        flm.quantize(flm.quantize(backbone))
    with pytest.raises(ValueError, match="not quantised yet"):
        flm.quantize(backbone, where="decoder_0/attention/dot_product")
    with pytest.raises(ValueError, match="without adapters. Received one .* decoder_0/attention/q"):
        flm.quantize(flm.peft.lora(backbone))
    with pytest.raises(ValueError, match="float32 or bfloat16: .* Received float16 at"):
        flm.quantize(flm.Backbone.from_preset(folder, dtype="float16"))
    some = flm.quantize(backbone, where="decoder_*/mlp/*")
    kinds = {x.quantization_mode for x in flm.select(some, keras.layers.Dense).values()}
    assert kinds == {None, "int8"}
    with pytest.raises(ValueError, match="a directory holds no integers"):
        some.save_preset(folder / "directory")
