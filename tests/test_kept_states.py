"""What each layer keeps: shapes and dtypes that differ by layer, and layers that keep nothing.

No family needs it yet: the graph is built by hand. Layers with a window have smaller heads and
fewer key heads, one layer keeps its keys in float32, one has an MLP alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import functional_llm as flm
from functional_llm.blocks.attention import Kept, Part, attention, heads
from functional_llm.blocks.decoder import decoder, pre_norm
from functional_llm.blocks.language_model import LayerType, causal_lm
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import Rope, rotary
from functional_llm.layers.attention import AttentionDotProduct
from functional_llm.layers.cache import grow_cache, make_cache, num_slots
from functional_llm.presets.dtypes import dtype_policy

V, D, WINDOW = 64, 32, 5
SIZES = {"full_attention": (4, 2, 16), "sliding_attention": (2, 1, 8)}
IDS = np.random.default_rng(0).integers(0, V, (2, 24))


def _attend(inputs: dict[str, Any]) -> Any:
    key = ops.cast(inputs["key"], inputs["query"].dtype)
    return AttentionDotProduct(name="dot_product")({**inputs, "key": key})


def _layer(kind: str, name: str, key_dtype: str | None = None) -> Any:
    queries, keys, size = SIZES[kind]
    in_dtype: list[Part] = [] if key_dtype is None else [lambda x, _: ops.cast(x, key_dtype)]
    mixer = attention(
        query=[heads(queries, size, "query"), rotary()],
        key=[heads(keys, size, "key"), rotary(), *in_dtype],
        value=[heads(keys, size, "value")],
        output=keras.layers.Dense(D, name="output"),
        product=None if key_dtype is None else _attend,
    )
    return pre_norm(name, partial(rms_norm, 1e-6), mixer, gated_mlp(48, D, "silu"))


def build(dtype: str = "float32") -> flm.Backbone:
    keras.utils.set_random_seed(0)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    with dtype_policy(dtype):
        layers = [(kind, _layer(kind, f"decoder_{i}")) for i, kind in enumerate(kinds)]
        alone = decoder("decoder_2", [[rms_norm(1e-6, "mlp_norm"), gated_mlp(48, D, "silu")]])
        layers[2] = ("sliding_attention", alone)
        layers[3] = ("full_attention", _layer("full_attention", "decoder_3", "float32"))
        keeps: list[dict[str, Any]] = [
            {"attention": {"key": (keys, size), "value": (keys, size)}}
            for _, keys, size in (SIZES[kind] for kind in kinds)
        ]
        keeps[2] = {}
        keeps[3]["attention"]["key"] = Kept(keeps[3]["attention"]["key"], "float32")
        ropes = {kind: Rope(size, 1e4) for kind, (_, _, size) in SIZES.items()}
        inputs, outputs = causal_lm(
            vocabulary_size=V,
            hidden_dim=D,
            layer_types={
                "full_attention": LayerType(ropes["full_attention"]),
                "sliding_attention": LayerType(ropes["sliding_attention"], WINDOW),
            },
            layers=layers,
            keeps=keeps,
            final_norm=rms_norm(1e-6, "final_norm"),
            tie_word_embeddings=True,
        )
        return flm.Backbone(inputs, outputs)


@pytest.fixture(scope="module")
def backbone() -> flm.Backbone:
    return build()


def test_a_cache_has_what_each_layer_keeps() -> None:
    cache = make_cache(build("bfloat16"), 2, 12)
    full, sliding = cache["full_attention"], cache["sliding_attention"]
    assert full["decoder_0"]["attention"]["value"].shape == (2, 12, 2, 16)
    assert sliding["decoder_1"]["attention"]["value"].shape == (2, WINDOW, 1, 8)
    assert sliding["decoder_2"] == {}
    assert full["decoder_0"]["attention"]["key"].dtype == "bfloat16"
    assert full["decoder_3"]["attention"]["key"].dtype == "float32"
    assert full["decoder_3"]["attention"]["value"].dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_chunks_through_a_cache_that_grows(dtype: str) -> None:
    model = build(dtype)
    expected = np.asarray(model(IDS), "float32")
    cache = make_cache(model, 2, 8)
    dtypes = keras.tree.map_structure(lambda x: str(x.dtype), cache)
    results = []
    for start, stop in ((0, 8), (8, 9), (9, 16), (16, 24)):
        if stop > num_slots(cache):
            cache = grow_cache(model, cache, 2 * num_slots(cache))
        result = model({"token_ids": IDS[:, start:stop], "cache": cache})
        cache = result["cache"]
        results.append(np.asarray(result["logits"], "float32"))
        assert keras.tree.map_structure(lambda x: str(x.dtype), cache) == dtypes
    tolerance = 1e-5 if dtype == "float32" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(results, 1), expected, atol=tolerance, rtol=0)


def test_a_leaf_in_float32_keeps_its_digits() -> None:
    model = build("bfloat16")
    result = model({"token_ids": IDS, "cache": make_cache(model, 2, 24)})
    cache = result["cache"]["full_attention"]["decoder_3"]["attention"]
    cache["key"] = ops.full_like(cache["key"], 1 / 3)
    inputs = {"token_ids": IDS[:, :2], "cache": result["cache"]}
    again = model(inputs)["cache"]["full_attention"]["decoder_3"]["attention"]["key"]
    assert np.asarray(again)[0, 5, 0, 0] == np.float32(1 / 3)


def test_generation(backbone: flm.Backbone) -> None:
    generator = flm.TextGenerator(backbone, None)
    prompts = [IDS[0, :9].tolist(), IDS[1, :3].tolist()]
    new = generator.generate_ids(prompts, max_new_tokens=12)
    for prompt, ids in zip(prompts, new, strict=True):
        best = np.argmax(backbone(np.array([[*prompt, *ids]]))[0], axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == list(ids)


def test_the_stock_file(backbone: flm.Backbone, tmp_path: Path) -> None:
    backbone.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    expected = np.asarray(backbone(IDS))
    np.testing.assert_allclose(model(IDS), expected, atol=1e-5, rtol=0)
    stock = model.get_layer("decoder")
    assert set(stock.input["cache"]) == {"decoder_0", "decoder_1", "decoder_3"}
    cache = keras.tree.map_structure(
        lambda x: np.zeros((2, 24, *x.shape[2:]), x.dtype), stock.input["cache"]
    )
    logits = []
    for start, stop in ((0, 10), (10, 11), (11, 24)):
        length = np.full(2, start, "int32")
        result = stock({"token_ids": IDS[:, start:stop], "cache_length": length, "cache": cache})
        logits.append(np.asarray(result["logits"]))
        for kept, update in zip(
            keras.tree.flatten(cache), keras.tree.flatten(result["cache_update"]), strict=True
        ):
            kept[:, start:stop] = update
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, atol=1e-5, rtol=0)


def test_one_kept_for_each_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        causal_lm(
            vocabulary_size=V,
            hidden_dim=D,
            layer_types={"full_attention": LayerType(Rope(16, 1e4))},
            layers=[("full_attention", _layer("full_attention", "decoder_0"))],
            keeps=[],
            final_norm=rms_norm(1e-6, "final_norm"),
            tie_word_embeddings=True,
        )
