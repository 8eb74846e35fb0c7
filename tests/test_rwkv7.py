"""RWKV-7, which Transformers does not have: KerasHub's says that the tests' reference is right.

The properties of every family are those of test_properties.py.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.peft.adapter import find_adapters
from pair import TOKENS
from reference import make_reference, reference_logits, save_reference
from test_gguf_families import CONVERT
from test_world_tokenizer import TEXTS, write_vocabulary

NAMES = [name for name, config in CONFIGS.items() if config["model_type"] == "rwkv7"]
CONFIG = CONFIGS["rwkv7_three_heads"]


def _in_keras_hub(reference: Any) -> Any:
    """Returns KerasHub's model with the reference's weights."""
    import keras_hub

    config, tensors = reference.config, reference.state_dict()
    with pytest.warns(UserWarning, match="rwkv_ops"):
        model = keras_hub.models.RWKV7Backbone(
            hidden_size=config.hidden_size,
            head_size=config.head_dim,
            num_layers=config.num_hidden_layers,
            vocabulary_size=config.vocab_size,
            intermediate_dim=len(tensors["model.layers.0.ffn.key.weight"]),
            gate_lora=config.gate_low_rank_dim,
            mv_lora=config.v_low_rank_dim,
            aaa_lora=config.a_low_rank_dim,
            decay_lora=config.decay_low_rank_dim,
            dtype="float32",
        )

    def assign(variable: Any, name: str, transposed: bool = False) -> None:
        x = tensors.pop(name).numpy()
        variable.assign((x.T if transposed else x).reshape(variable.shape))

    def assign_norm(layer: Any, name: str, size: int = 1) -> None:
        assign(layer.gamma, f"{name}.weight")
        assign(layer.beta, f"{name}.bias")
        layer.epsilon = size * config.norm_eps  # which is no argument of the class

    assign(model.token_embedding.embeddings, "model.embeddings.weight")
    assign(model.head.kernel, "lm_head.weight", transposed=True)
    assign_norm(model.output_layer_norm, "model.norm")
    for i, block in enumerate(model.rwkv_layers):
        layer, att, ffn = f"model.layers.{i}", block.att, block.ffn
        if i == 0:
            assign_norm(block.ln0, f"{layer}.pre_norm")
        assign_norm(block.ln1, f"{layer}.attn_norm")
        assign_norm(block.ln2, f"{layer}.ffn_norm")
        assign_norm(att.ln_x, f"{layer}.attn.g_norm", config.head_dim)
        for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k"):
            assign(getattr(att, x), f"{layer}.attn.{x}")
        named = {"r": att.receptance, "k": att.key, "v": att.value, "o": att.output_layer}
        for x, dense in named.items():
            assign(dense.kernel, f"{layer}.attn.{x}_proj.weight", transposed=True)
        for x in "wag" if i == 0 else "wagv":
            place = f"{layer}.attn.{x}_lora.lora"
            assign(getattr(att, f"{x}1"), f"{place}.0.weight", transposed=True)
            assign(getattr(att, f"{x}2"), f"{place}.2.weight", transposed=True)
            if x != "g":
                assign(getattr(att, f"{x}0"), f"{place}.2.bias")
        assign(ffn.x_k, f"{layer}.ffn.x_k")
        assign(ffn.key.kernel, f"{layer}.ffn.key.weight", transposed=True)
        assign(ffn.value.kernel, f"{layer}.ffn.value.weight", transposed=True)
    assert not tensors
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_what_keras_hub_computes(name: str) -> None:
    reference = make_reference(CONFIGS[name])
    mask = np.ones_like(TOKENS)
    expected = _in_keras_hub(reference)({"token_ids": TOKENS, "padding_mask": mask})
    np.testing.assert_allclose(reference_logits(reference, TOKENS), expected, atol=1e-5, rtol=0)


@pytest.mark.real
@pytest.mark.tiny
def test_a_gguf_file(llama_cpp: Path, tmp_path: Path) -> None:
    save_reference(CONFIG | {"vocab_size": 300, "eos_token_id": None}, tmp_path)
    write_vocabulary(tmp_path)
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    backbone = flm.Backbone.from_preset(tmp_path)
    read = flm.Backbone.from_preset(tmp_path / "model.gguf")
    for ours, theirs in zip(backbone.variables, read.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)
    in_file, in_folder = map(flm.Tokenizer.from_preset, (tmp_path / "model.gguf", tmp_path))
    for text in TEXTS:
        assert in_file.encode(text) == in_folder.encode(text)
        assert in_file.decode(in_file.encode(text)) == text
    assert in_file.stop_token_ids == in_folder.stop_token_ids == {0, 261}
    assert in_file.eos_token_id == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "hidden_size to be head_dim times num_heads"),
        ({"num_heads": 2}, "hidden_size to be head_dim times num_heads, received 24, 8 and 2"),
        ({"value_dim": [24]}, "value_dim to be hidden_size, 24, for each of the 2 layers"),
        ({"attn": {"layers": [1]}}, "does not handle: attn="),
        ({"gate_low_rank_dim": None}, "lacks the keys .'gate_low_rank_dim'"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        flm.Backbone.from_preset(tmp_path, load_weights=False)


def test_adapters_have_usual_targets(tmp_path: Path) -> None:
    """There is no query: receptances ask, as queries do."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    backbone = flm.Backbone.from_preset(tmp_path, load_weights=False)
    expected = {f"decoder_{i}/time_mix/{name}" for i in (0, 1) for name in ("receptance", "value")}
    model = flm.peft.lora(backbone, rank=2)
    assert {path for path, _ in find_adapters(model)} == expected
    flm.peft.save_adapter(model, tmp_path / "adapter")
    loaded = flm.peft.load_adapter(backbone, tmp_path / "adapter")
    assert {path for path, _ in find_adapters(loaded)} == expected
