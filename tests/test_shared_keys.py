"""Layers that look at the keys and values of earlier ones: Gemma 4, Gemma 3n."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops, tree

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones import llama
from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.stacks import build_around, with_rope
from functional_llm.formats.hf_config import read_config, write_config
from functional_llm.graph.selection import walk
from functional_llm.graph.types import Layer

NAMES = ["gemma4_shared_keys", "gemma3n_streams"]
IDS = np.random.default_rng(0).integers(0, 128, (2, 12)).astype("int32")


def make(name: str) -> flm.Backbone:
    """Returns a random model; in Gemma 3n, streams beside the first count, too."""
    keras.utils.set_random_seed(0)
    family = FAMILIES[CONFIGS[name]["model_type"]]
    config = read_config(CONFIGS[name], family)
    inputs, outputs = family.build(config)
    return flm.Backbone(inputs, outputs, config=config)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_borrows_keeps_nothing(name: str) -> None:
    backbone = make(name)
    cache = flm.make_cache(backbone, 2, 16)
    kept = {layer for group in cache.values() for layer, x in group.items() if tree.flatten(x)}
    assert kept == {"positions", "decoder_0", "decoder_1"}
    paths = [path for path, _ in walk(backbone, composites=True)]
    assert "decoder_1/attention/key" in paths and "decoder_3/attention/query" in paths
    assert not {f"decoder_{i}/attention/{x}" for i in (2, 3) for x in ("key", "value")} & {*paths}


@pytest.mark.parametrize("part", ["key", "value"])
def test_rewiring_a_producer_reaches_its_consumers(part: str) -> None:
    """Nothing but what is lent tells `decoder_3` of an edit, for its own input is set to one."""
    backbone = make("gemma4_shared_keys")

    def mirrored(layer: Layer, path: str) -> Layer:
        return flm.CompositeLayer(lambda x: ops.flip(layer(x), axis=-1), name=layer.name)

    def same(layer: Layer, path: str, inputs: dict[str, Any]) -> Any:
        return layer({**inputs, "x": ops.ones_like(inputs["x"])})

    def attended(model: flm.Backbone) -> np.ndarray:
        model = flm.rewire(model, call=same, where=_LAST)
        return np.asarray(flm.capture(model, _LAST)(IDS)["captured"][_LAST])

    edited = flm.rewire(backbone, mirrored, where=f"decoder_1/attention/{part}")
    assert np.abs(attended(edited) - attended(backbone)).max() > 1e-3


_LAST = "decoder_3/attention"

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "all borrow": ("gemma4_shared_keys", {"num_kv_shared_layers": 4}, "one of each type"),
    "a type without": ("gemma4_shared_keys", {"num_kv_shared_layers": 3}, "one of each type"),
    "below zero": ("gemma3n_streams", {"num_kv_shared_layers": -1}, "one of each type"),
    "both ways": ("gemma4_experts", {"use_bidirectional_attention": "all"}, "one direction"),
    "experts": ("gemma4_experts", {"top_k_experts": 6}, "num_experts_per_tok from 1"),
    "no experts": ("gemma4_experts", {"num_experts": None}, "num_experts"),
    "rope": (
        "gemma4_experts",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
        "unknown rope_type='yarn'",
    ),
    "a sliding layer": (
        "gemma4_experts",
        {"per_layer_config": {"0": {"head_dim": 4}}},
        "layers of full_attention",
    ),
    "unlike layers": (
        "gemma4_layer_config_default_ropes",
        {"per_layer_config": {"0": {"head_dim": 4}}},
        "says the same of all",
    ),
    "heads": (
        "gemma4_values_are_keys",
        {"num_global_key_value_heads": 3},
        "a multiple of the key and value heads",
    ),
    "widths": ("gemma3n_widths_untied", {"intermediate_size": [8]}, "for each of 2 layers"),
    "shares": ("gemma3n_streams", {"activation_sparsity_pattern": [1.0] * 4}, "below 1"),
    "stream": ("gemma3n_streams", {"altup_active_idx": 3}, "altup_active_idx"),
}


@pytest.mark.parametrize("case", BAD)
def test_numbers_that_do_not_fit(case: str) -> None:
    name, changes, message = BAD[case]
    config = {**CONFIGS[name], **changes}
    with pytest.raises(ValueError, match=message):
        read_config(config, FAMILIES[config["model_type"]])


@pytest.mark.parametrize("name", [x for x in CONFIGS if x.startswith(("gemma4", "gemma3n"))])
def test_written_numbers_are_read_again(name: str) -> None:
    family = FAMILIES[CONFIGS[name]["model_type"]]
    config = read_config(CONFIGS[name], family)
    assert read_config(write_config(config, family, "float32"), family) == config


@pytest.mark.parametrize("lender", ["decoder_0", "decoder_1", "decoder_7"])
def test_a_lender_that_lends_nothing(lender: str) -> None:
    name = "llama_grouped"
    config: Any = read_config(CONFIGS[name], FAMILIES[CONFIGS[name]["model_type"]])
    layers = [("full_attention", llama.build_decoder(config, f"decoder_{i}")) for i in range(2)]
    with pytest.raises(ValueError, match=rf"Received: '{lender}'; such layers are \[\]"):
        build_around(
            config, layers, {"full_attention": with_rope(config)}, lenders={"decoder_1": lender}
        )
