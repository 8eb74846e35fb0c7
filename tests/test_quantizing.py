"""int8 and int4 as a rewiring."""

from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from keras import ops

import functional_llm as flm
from configs import CONFIGS
from functional_llm.edits.quantization import quantized_modes
from functional_llm.edits.quantized_layers import dequantized
from functional_llm.edits.rounding import round_to_int4
from functional_llm.layers.experts import ExpertDense
from nightly import FAMILIES_AND_KINDS, one_of_each_kind
from reference import make_reference, save_reference
from tiny import save_tokenizer
from tiny_gguf import save_gguf

# With a head and without one, with biases and without.
EVERYTHING = [keras.layers.Dense, keras.layers.Embedding]
some_families = pytest.mark.parametrize(
    "folder", ["llama_grouped", "gemma2_soft_caps", "gpt2_tied"], indirect=True
)


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


@one_of_each_kind
def test_matrices_take_a_byte_a_number_and_logits_stay_near(backbone: Any) -> None:
    token_ids, before = _tokens(2, 12), [v.path for v in backbone.variables]
    expected = _logits(backbone, token_ids)
    quantized = flm.quantize(backbone)
    assert type(quantized) is type(backbone)
    others = ("scale", "gamma", "beta", "bias")  # of norms and experts, one a head or an expert
    matrices = [v for v in quantized.variables if len(v.shape) == 2 and v.name not in others]
    matrices = [v for v in matrices if not v.path.endswith("router/kernel")]  # which stays
    assert {v.dtype for v in matrices} == {"int8"}
    assert not any(v.trainable for v in matrices)
    received = _logits(quantized, token_ids)
    error = np.abs(received - expected)
    assert 0 < error.mean() < 0.05 * expected.std()
    assert [v.path for v in backbone.variables] == before
    np.testing.assert_array_equal(_logits(backbone, token_ids), expected)


@one_of_each_kind
def test_int4_takes_half_a_byte_a_number_and_is_what_stock_keras_makes_of_it(
    backbone: Any, tmp_path: Path
) -> None:
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
        np.testing.assert_allclose(stock(token_ids), received, atol=1e-4)
    again = flm.Backbone.from_preset(tmp_path / "model.keras")
    assert quantized_modes(again) == quantized_modes(quantized)
    for new, old in zip(again.variables, quantized.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(old))


def test_int4_leaves_what_is_of_tokens_in_int8(backbone: Any) -> None:
    """And what is of experts."""
    modes = quantized_modes(flm.quantize(backbone, "int4/4"))
    assert {path for path, mode in modes.items() if mode == "int8"} == {
        path
        for path, layer in flm.walk(backbone)
        if isinstance(layer, keras.layers.Embedding | ExpertDense) or path == "head"
    }
    assert set(modes.values()) == {"int8", "int4/4"}


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


@one_of_each_kind
def test_to_load_quantised_is_to_quantise_what_is_loaded(folder: Path, backbone: Any) -> None:
    for mode in ("int8", "int4/4"):
        expected = flm.quantize(backbone, mode)
        received = flm.Backbone.from_preset(folder, quantize=mode)
        assert quantized_modes(received) == quantized_modes(expected)
        for new, old in zip(received.variables, expected.variables, strict=True):
            assert (new.path, new.dtype, new.trainable) == (old.path, old.dtype, old.trainable)
            np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(old))


def test_grids_without_an_offset_come_out_exactly() -> None:
    # As blocks of Q4_0: float16 scales of either sign, and any integers.
    rng = np.random.default_rng(0)
    largest = rng.integers(1, 9, (4, 1, 50))
    steps = np.clip(rng.integers(-8, 8, (4, 32, 50)), -largest, largest - (largest == 8))
    scales = rng.normal(size=(4, 1, 50)).astype("float16").astype("float32")
    matrix = (steps * scales).astype("float32").reshape(128, 50)
    integers, found, zeros = round_to_int4(matrix, 32)
    assert integers.min() >= -8 and integers.max() <= 7
    steps = integers.reshape(4, 32, 50) - zeros[:, None]
    received = (steps.astype("float32") * found[:, None]).reshape(128, 50)
    np.testing.assert_array_equal(received, matrix)


def test_grids_are_nearer_than_those_of_keras() -> None:
    rng = np.random.default_rng(1)
    matrix = (rng.normal(size=(64, 40)) + 2 * rng.normal(size=40)).astype("float32")
    matrix[:, 0], matrix[:, 1] = 0, 3  # one number only

    def error(integers: Any, scales: Any, zeros: Any) -> float:
        grouped = np.asarray(integers, "float32").reshape(2, 32, 40)
        steps = grouped - np.asarray(zeros, "float32")[:, None]
        difference = (steps * np.asarray(scales)[:, None]).reshape(64, 40) - matrix
        return float(np.square(difference).sum())

    own = round_to_int4(matrix, 32)
    stock = keras.quantizers.abs_max_quantize_grouped_with_zero_point(matrix, 32, to_numpy=True)
    assert error(*own) < 0.5 * error(*stock)
    assert not own[0][:, 0].any() and error(*own) > 0
    difference = own[0][:, 1].astype("int32") - np.repeat(own[2][:, 1], 32)
    np.testing.assert_allclose(difference * np.repeat(own[1][:, 1], 32), 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "mode", "most"),
    [
        (Kind.Q4_0, "int4", 0),
        (Kind.Q4_1, "int4", 0.08),
        (Kind.Q8_0, "int8", 0.02),
        (Kind.Q8_0, "int4", 0.1),
    ],
)
def test_matrices_of_a_gguf_file(kind: Kind, mode: str, most: float, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = {**CONFIGS["llama_grouped"], "hidden_size": 64, "intermediate_size": 96}
    tokenizer = flm.Tokenizer.from_preset(tmp_path)
    model = make_reference({**config, "vocab_size": tokenizer.vocabulary_size})
    path = tmp_path / "tiny.gguf"
    save_gguf(model, tmp_path / "tokenizer.json", path, kind)
    plain = flm.Backbone.from_preset(path)
    quantized = flm.Backbone.from_preset(path, quantize=mode)
    layers = flm.select(quantized, keras.layers.Dense)
    for name, layer in flm.select(plain, keras.layers.Dense).items():
        if name == "head":  # int8
            continue
        expected = ops.convert_to_numpy(layer.kernel)
        received = ops.convert_to_numpy(dequantized(layers[name], "kernel"))
        assert np.abs(received - expected).mean() <= most * expected.std()


@pytest.mark.real
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
