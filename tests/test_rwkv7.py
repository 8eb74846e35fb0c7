"""RWKV-7, which Transformers does not have: KerasHub's is the reference, each row alone.

Its weights go into a checkpoint as flash-linear-attention writes it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import functional_llm as flm
from functional_llm.layers.cache import make_cache
from pair import compiled
from test_gguf_families import CONVERT
from test_world_tokenizer import TEXTS, write_vocabulary

V, D, N, LAYERS, LENGTH = 300, 24, 8, 3, 75  # more than two chunks of tokens
SIZES = {"gate_lora": 5, "mv_lora": 3, "aaa_lora": 4, "decay_lora": 6}
CONFIG: dict[str, Any] = {
    "model_type": "rwkv7",
    "architectures": ["RWKV7ForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "head_dim": N,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 40,
    "gate_low_rank_dim": 5,
    "v_low_rank_dim": 3,
    "a_low_rank_dim": 4,
    "decay_low_rank_dim": 6,
    "hidden_act": "sqrelu",
    "norm_eps": 1e-5,
    "attn": None,
    "num_heads": None,
    "value_dim": [D] * LAYERS,
}
IDS = np.random.default_rng(0).integers(1, V, (2, LENGTH)).astype("int32")


def _make_reference() -> Any:
    import keras_hub

    with pytest.warns(UserWarning, match="rwkv_ops"):
        reference = keras_hub.models.RWKV7Backbone(
            hidden_size=D,
            head_size=N,
            num_layers=LAYERS,
            vocabulary_size=V,
            intermediate_dim=40,
            dtype="float32",
            **SIZES,
        )
    random = np.random.default_rng(1)
    for variable in reference.variables:
        noise = 0.4 * random.normal(size=variable.shape)
        variable.assign(np.asarray(variable) + noise)
    return reference


def _tensors(reference: Any) -> dict[str, np.ndarray]:
    """The weights under fla's names."""

    def norm(name: str, layer: Any) -> dict[str, Any]:
        return {f"{name}.weight": layer.gamma, f"{name}.bias": layer.beta}

    found = {
        "model.embeddings.weight": reference.token_embedding.embeddings,
        "lm_head.weight": reference.head.kernel.value.T,
        **norm("model.norm", reference.output_layer_norm),
    }
    for i, block in enumerate(reference.rwkv_layers):
        layer, att, ffn = f"model.layers.{i}", block.att, block.ffn
        if i == 0:
            found |= norm(f"{layer}.pre_norm", block.ln0)
        found |= norm(f"{layer}.attn_norm", block.ln1) | norm(f"{layer}.ffn_norm", block.ln2)
        found |= norm(f"{layer}.attn.g_norm", att.ln_x)
        for x in "rwkvag":
            found[f"{layer}.attn.x_{x}"] = getattr(att, f"x_{x}").value[None, None]
        for x in ("k_k", "k_a", "r_k"):
            found[f"{layer}.attn.{x}"] = getattr(att, x)
        named = {"r": att.receptance, "k": att.key, "v": att.value, "o": att.output_layer}
        for x, dense in named.items():
            found[f"{layer}.attn.{x}_proj.weight"] = dense.kernel.value.T
        for x in "wag" if i == 0 else "wagv":
            place = f"{layer}.attn.{x}_lora.lora"
            found[f"{place}.0.weight"] = getattr(att, f"{x}1").value.T
            found[f"{place}.2.weight"] = getattr(att, f"{x}2").value.T
            if x != "g":
                found[f"{place}.2.bias"] = getattr(att, f"{x}0")
        found[f"{layer}.ffn.x_k"] = ffn.x_k
        found[f"{layer}.ffn.key.weight"] = ffn.key.kernel.value.T
        found[f"{layer}.ffn.value.weight"] = ffn.value.kernel.value.T
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


@pytest.fixture(scope="module")
def reference() -> Any:
    return _make_reference()


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rwkv7")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_tensors(reference), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> flm.Backbone:
    return flm.Backbone.from_preset(folder)


@pytest.fixture(scope="module")
def expected(reference: Any) -> np.ndarray:
    return np.asarray(reference({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def _near(received: Any, expected: Any) -> None:
    # Weights are large, so that each counts: logits go up to 10, and rounding to 3e-4.
    np.testing.assert_allclose(received, expected, atol=1e-3, rtol=0)


def test_logits_equal_those_of_keras_hub(backbone: flm.Backbone, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 1
    _near(compiled(backbone)(IDS), expected)
    alone = compiled(backbone)(np.roll(IDS, -40, axis=1))
    assert np.abs(alone[:, :35] - expected[:, 40:]).max() > 1e-2  # what stands before counts


def test_padding_anywhere_and_chunks(backbone: flm.Backbone, expected: np.ndarray) -> None:
    places = np.array([np.arange(LENGTH) * 5 // 4 + 2, np.arange(LENGTH) + (np.arange(LENGTH) > 7)])
    ids, mask = np.full((2, 100), 7, "int32"), np.zeros((2, 100), int)
    np.put_along_axis(ids, places, IDS, axis=1)
    np.put_along_axis(mask, places, 1, axis=1)
    run, cache = compiled(backbone), make_cache(backbone, 2, 112)
    logits = np.array(run({"token_ids": ids, "attention_mask": mask}))
    _near(np.take_along_axis(logits, places[..., None], axis=1), expected)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    for columns in (slice(0, 13), slice(13, 14), slice(14, 15), slice(15, 100)):
        result = run(
            {"token_ids": ids[:, columns], "positions": positions[:, columns], "cache": cache}
        )
        cache, logits[:, columns] = result["cache"], result["logits"]
    _near(np.take_along_axis(logits, places[..., None], axis=1), expected)
    assert {x.shape[1] for x in jax.tree.leaves(cache)} == {1}


def test_segments_are_read_alone(backbone: flm.Backbone) -> None:
    ends = [0, 7, 8, 44, LENGTH]
    segments = np.repeat(np.arange(4), np.diff(ends))[None].repeat(2, axis=0)
    positions = np.arange(LENGTH) - np.array(ends)[segments]
    run = compiled(backbone)
    logits = run({"token_ids": IDS, "positions": positions, "segment_ids": segments})
    for begin, end in zip(ends, ends[1:], strict=False):
        alone = run(np.roll(IDS, -begin, axis=1))
        _near(logits[:, begin:end], alone[:, : end - begin])


def test_text_is_written(backbone: flm.Backbone, reference: Any) -> None:
    prompts = [IDS[0, :9].tolist(), IDS[1, :3].tolist()]
    new = flm.TextGenerator(backbone).generate_ids(prompts, max_new_tokens=5)
    for prompt, text in zip(prompts, new, strict=True):
        ids = np.array([[*prompt, *text]])
        logits = np.asarray(reference({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        assert text == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_gradients_are_finite_in_bfloat16(folder: Path) -> None:
    model = flm.Backbone.from_preset(folder, dtype="bfloat16")
    variables = (model.trainable_variables, model.non_trainable_variables)
    trained, fixed = jax.tree.map(lambda variable: variable.value, variables)
    ids = np.random.default_rng(2).integers(0, V, (1, 2048)).astype("int32")

    def loss(values: Any) -> Any:
        logits, _ = model.stateless_call(values, fixed, ids)
        logs = jax.nn.log_softmax(logits.astype("float32"))
        return -jax.numpy.take_along_axis(logs[:, :-1], ids[:, 1:, None], axis=2).mean()

    gradients = jax.jit(jax.grad(loss))(trained)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        gradient = np.asarray(gradient, "float32")
        assert np.isfinite(gradient).all() and (gradient != 0).any(), variable.path


def test_the_checkpoint_and_back(folder: Path, backbone: flm.Backbone, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    backbone.save_preset(tmp_path / "saved")
    received = load_file(tmp_path / "saved" / "model.safetensors")
    expected = load_file(folder / "model.safetensors")
    assert set(received) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(received[name], x, err_msg=name)
    assert flm.Backbone.from_preset(tmp_path / "saved").config == backbone.config


@pytest.mark.real
@pytest.mark.tiny
def test_a_gguf_file(folder: Path, backbone: flm.Backbone, llama_cpp: Path) -> None:
    write_vocabulary(folder)
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = flm.Backbone.from_preset(folder / "model.gguf")
    for ours, theirs in zip(backbone.variables, read.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)
    in_file, in_folder = map(flm.Tokenizer.from_preset, (folder / "model.gguf", folder))
    for text in TEXTS:
        assert in_file.encode(text) == in_folder.encode(text)
        assert in_file.decode(in_file.encode(text)) == text
    assert in_file.stop_token_ids == in_folder.stop_token_ids == {0, 261}
    assert in_file.eos_token_id == 0


def test_no_stock_file(backbone: flm.Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no form in built-in layers.*save_preset"):
        backbone.save(tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "hidden_size to be head_dim times num_heads"),
        ({"num_heads": 2}, "hidden_size to be head_dim times num_heads, received 24, 8 and 2"),
        ({"value_dim": [D]}, "value_dim to be hidden_size, 24, for each of the 3 layers"),
        ({"attn": {"layers": [1]}}, "does not handle: attn="),
        ({"gate_low_rank_dim": None}, "lacks the keys .'gate_low_rank_dim'"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        flm.Backbone.from_preset(tmp_path, load_weights=False)
