"""int8 as a rewiring."""

from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from nightly import FAMILIES_AND_KINDS, one_of_each_kind
from reference import save_reference

# With a head and without one, with biases and without.
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
    others = ("scale", "gamma", "beta")  # of norms, which may have one a head
    matrices = [v for v in quantized.variables if len(v.shape) == 2 and v.name not in others]
    matrices = [v for v in matrices if not v.path.endswith("router/kernel")]  # which stays
    assert {v.dtype for v in matrices} == {"int8"}
    assert not any(v.trainable for v in matrices)
    received = _logits(quantized, token_ids)
    error = np.abs(received - expected)
    assert 0 < error.mean() < 0.05 * expected.std()
    assert [v.path for v in backbone.variables] == before
    np.testing.assert_array_equal(_logits(backbone, token_ids), expected)


@some_families
def test_generation_with_the_cache_is_what_the_whole_text_gives(backbone: Any) -> None:
    quantized = flm.quantize(backbone)
    prompts = [_tokens(6).tolist(), _tokens(9, seed=1).tolist()]
    rows = flm.TextGenerator(quantized).generate_ids(prompts, max_new_tokens=5)
    for prompt, new in zip(prompts, rows, strict=True):
        logits = _logits(quantized, np.array([prompt + new], "int32"))[0]
        chosen = logits[len(prompt) - 1 : -1]
        assert (chosen.max(-1) - chosen[np.arange(5), new] < 1e-3).all()


@some_families
def test_lora_on_top_trains_and_travels_in_a_stock_file(backbone: Any, tmp_path: Path) -> None:
    quantized = flm.quantize(backbone)
    model = flm.peft.lora(quantized, rank=2, seed=0)
    token_ids = _tokens(3, 9)
    np.testing.assert_allclose(_logits(model, token_ids), _logits(quantized, token_ids), atol=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    losses = model.fit(token_ids[:, :-1], token_ids[:, 1:], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.05
    assert {v.path.rpartition("/")[2] for v in model.trainable_variables} == {"lora_a", "lora_b"}
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
    merged = flm.peft.merge(model)
    assert np.abs(_logits(merged, token_ids) - expected).mean() < 0.05 * expected.std()


@some_families
def test_gradients_pass_what_is_rounded(backbone: Any) -> None:
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

    plain, quantized = gradient(backbone), gradient(flm.quantize(backbone))
    cosine = plain @ quantized / np.linalg.norm(plain) / np.linalg.norm(quantized)
    assert cosine > 0.98


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
    with pytest.raises(ValueError, match="Expected mode 'int8'"):
        flm.quantize(backbone, "int3")
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
    with pytest.raises(ValueError, match="does not fit its config"):
        some.save_preset(folder / "directory")
