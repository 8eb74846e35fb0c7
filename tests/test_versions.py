"""What a user does first, in few seconds and without torch: `make test-versions` runs it at the
edges of the ranges in pyproject.toml.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm import training
from nightly import FAMILIES_AND_KINDS
from stock import StockKeras
from tiny import TEXTS, save_tokenizer

ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: flm.peft.lora(model, rank=3, targets="all"),
    "dora": lambda model: flm.peft.dora(model, rank=2),
    "svf": flm.peft.svf,
}
IDS = np.random.default_rng(0).integers(3, 100, (2, 9)).astype("int32")


def _with_noise(model: Any) -> Any:
    """Random weights as they come hardly move attention, and adapters begin without an effect."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        noise = random.normal(0, 0.2, variable.shape).astype("float32")
        variable.assign(keras.ops.cast(variable, "float32") + noise)
    return model


def _make(name: str, folder: Path, **changes: Any) -> Any:
    """Returns a model with random weights; its config, and a tokenizer, are in the folder."""
    size = save_tokenizer(folder)
    config = {**CONFIGS[name], "vocab_size": size, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return _with_noise(flm.Backbone.from_preset(folder, load_weights=False))


def _logits(model: Any, inputs: Any = IDS) -> np.ndarray:
    trained = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    program = jax.jit(lambda inputs: model.stateless_call(trained, others, inputs)[0])
    return np.asarray(program(inputs), "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    _make("llama_grouped", path).save_preset(path)
    return path


@pytest.fixture
def backbone(folder: Path) -> Any:
    return flm.Backbone.from_preset(folder)


def _expect_greedy(model: Any, prompts: list[list[int]]) -> None:
    """With the cache, each id is the likeliest one that a call without a cache gives."""
    for prompt, new in zip(
        prompts, flm.TextGenerator(model).generate_ids(prompts, 12), strict=True
    ):
        logits = _logits(model, np.array([prompt + new], "int32"))[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-4)


@pytest.mark.nightly  # as in test_properties.py, which needs other libraries
@pytest.mark.parametrize("name", FAMILIES_AND_KINDS)
def test_every_family_generates_as_it_computes(name: str, tmp_path: Path) -> None:
    _expect_greedy(_make(name, tmp_path), [IDS[0].tolist(), IDS[1, :4].tolist()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(folder: Path, backbone: Any, dtype: str) -> None:
    half = flm.Backbone.from_preset(folder, dtype=dtype)
    expected = _logits(backbone)
    assert np.abs(_logits(half) - expected).mean() < 0.05 * expected.std()
    assert len(flm.TextGenerator(half).generate_ids([[5, 9]], 6)[0]) == 6


def test_int8_is_near_and_generates(backbone: Any) -> None:
    expected, small = _logits(backbone), flm.quantize(backbone)
    assert np.abs(_logits(small) - expected).mean() < 0.05 * expected.std()
    assert len(flm.TextGenerator(small).generate_ids([[5, 9], [7]], 6)) == 2


@pytest.mark.nightly  # as in test_peft.py
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_merge_and_travel(backbone: Any, tmp_path: Path, name: str) -> None:
    base = _logits(backbone)
    adapted = ADAPTERS[name](backbone)
    np.testing.assert_allclose(_logits(adapted), base, atol=1e-4)
    expected = _logits(_with_noise(adapted))
    assert np.abs(expected - base).max() > 1e-2
    np.testing.assert_allclose(_logits(flm.peft.merge(adapted)), expected, atol=1e-3)
    flm.peft.save_adapter(adapted, tmp_path)
    loaded = flm.peft.load_adapter(backbone, tmp_path)
    np.testing.assert_allclose(_logits(loaded), expected, atol=1e-4)
    _expect_greedy(loaded, [[5, 9, 20]])


def test_a_graph_is_rewired_and_captured(backbone: Any) -> None:
    def double(layer: Any, path: str) -> Any:
        return flm.CompositeLayer([layer, keras.layers.Rescaling(2.0)]) if "down" in path else layer

    edited = flm.rewire(backbone, double)
    assert np.abs(_logits(edited) - _logits(backbone)).max() > 1e-2
    captured = flm.capture(edited, "decoder_*")(IDS)
    np.testing.assert_allclose(captured["logits"], _logits(edited), atol=1e-4)
    assert [len(path) for path in captured["captured"]] == [9, 9]


@pytest.mark.nightly  # as in test_stock_files.py
def test_files_of_stock_keras(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They load where this library is not imported, train, and decode with a cache."""
    ids = np.random.default_rng(2).integers(3, 100, (3, 72)).astype("int32")
    model, path = _with_noise(flm.peft.lora(backbone, rank=2)), tmp_path / "model.keras"
    model.save(path)
    np.savez(tmp_path / "model.npz", token_ids=ids, logits=_logits(model, ids), training="fully")
    again = flm.Backbone.from_preset(path)
    np.testing.assert_allclose(_logits(again), _logits(model), atol=1e-4)
    monkeypatch.setenv("FLM_STOCK_PYTHON", sys.executable)
    stock = StockKeras("jax", tmp_path / "log.txt")
    found = stock.result(path)
    stock.close()
    assert max(found["logits"], found["decoded"], found["again"]) < 1e-3
    assert found["losses"][-1] < found["losses"][0]
    assert found["changed"] > 0 and found["frozen_changed"] == 0


def test_fit_learns(backbone: Any) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    backbone.compile("adamw", loss)
    history = backbone.fit(IDS[:, :-1], IDS[:, 1:], epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_a_training_run_learns_and_is_read_again(backbone: Any, tmp_path: Path) -> None:
    rows = training.pack([training.Example(ids, np.arange(9) > 3) for ids in IDS], 20)
    settings = training.Settings(steps=3, batch_size=1, accumulate=2, remat=True)
    lines: list[str] = []
    history = training.train(backbone, rows, rows, settings, tmp_path, say=lines.append)
    assert len(history.losses) == 3 and history.losses[-1] < history.losses[0]
    again = training.train(backbone, rows, rows, settings, tmp_path, resume=True, say=lines.append)
    assert again.losses == history.losses


def test_text(folder: Path, backbone: Any) -> None:
    tokenizer = flm.Tokenizer.from_preset(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("user\nHello<|im_end|>\n<|im_start|>assistant\n")
    generator = flm.TextGenerator(backbone, tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 12, "sampler": "top_p", "seed": 1}
    expected = generator.generate(TEXTS[0], **options)
    assert "".join(generator.stream(TEXTS[0], **options)) == expected


# Beside other libraries, where they are installed. ------------------------------------------------


def test_transformers_reads_the_same_tokenizer(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = flm.Tokenizer.from_preset(folder)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_datasets_reads_a_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "texts.parquet"
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    assert [record.fields["text"] for record in training.read_records(path)] == TEXTS


def test_matplotlib_draws_a_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    training.plot_losses(tmp_path / "curve.png", [3.0, 2.0], [[1, 2.5], [2, 2.4]])
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_an_exported_program_runs(backbone: Any, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    path = tmp_path / "model.stablehlo"
    backbone.export(path)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    np.testing.assert_allclose(program.call(IDS), _logits(backbone), atol=1e-4)
