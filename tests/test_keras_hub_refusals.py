"""KerasHub: what cannot go, and bad input."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.backbones.families import FAMILIES
from functional_llm.formats.keras_hub_config import read_arguments
from hub_models import MODELS, make_hub

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama_head_size": ("llama_head_size", {}, "it cannot say head_dim=18"),
    "llama_biases": ("llama_biases", {}, "activation='gelu'.*attention_bias=True"),
    "llama_yarn": ("llama_yarn", {}, "rope_scaling"),
    "mistral_tied": ("mistral_window", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "qwen2_some_layers_slide": ("qwen2_some_layers_slide", {}, "layer_types"),
    "qwen2_moe_some_dense": ("qwen2_moe_some_dense", {}, r"dense_layers=\(0,\)"),
    "qwen2_moe_window": ("qwen2_moe_one_of_ninety_slides", {}, "no window on GPUs and TPUs"),
    "mixtral_tied": ("mixtral_all_chosen_tied", {}, "tie_word_embeddings=True"),
    "gemma_untied": ("gemma_untied_multi_head", {}, "tie_word_embeddings=False"),
    "gemma2_scale": ("gemma2_soft_caps", {}, "query_pre_attention_scalar=24"),
    "gemma3_ropes": ("gemma3_two_ropes", {}, "rope_max_wavelength=50000.0.*layer_types"),
    "gemma3n_untied": ("gemma3n_widths_untied", {}, "tie_word_embeddings=False"),
    "phi3_window": ("phi3_window_multi_head", {}, "sliding_window=8"),
    "phi3_part_of_each_head": ("phi3_long_texts", {}, "partial_rotary_factor=0.7"),
    "phi3_magnitude": ("phi3_tied_one_layer", {}, "tie_word_embeddings=True.*attention_factor"),
    "gpt_neox_untied": ("gpt_neox_five_heads", {}, "activation='gelu'.*tie_word_embeddings=False"),
    "gpt_neox_serial": ("gpt_neox_serial_theta", {}, "parallel_residual=False"),
    "bloom_untied": ("bloom_twelve_heads_untied", {}, "tie_word_embeddings=False"),
    "opt_narrow": ("opt_norms_behind_narrow_embedding", {}, "embedding_dim=20.*norm_before=False"),
    "falcon_rope": ("falcon_grouped_two_norms", {}, "num_parallel_norms=2.*use_alibi=False"),
    "gpt2_epsilon": ("gpt2_learned_positions", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kerashub_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    key, changes, message = REFUSED[name]
    write_config(tmp_path, key, changes)
    ours = flm.Backbone.from_preset(tmp_path, load_weights=False)
    with pytest.raises(ValueError, match=message):
        flm.to_keras_hub(ours)


def write_config(folder: Path, name: str, changes: dict[str, Any]) -> None:
    config = next((x for key, x in CONFIGS.items() if key == name), CONFIGS["gpt2_tied"])
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    make_hub("llama3").save_to_preset(folder)
    return folder


def changed(preset: Path, folder: Path, **changes: Any) -> Path:
    """Returns a copy of a preset whose config.json is changed; `None` takes a key away."""
    shutil.copytree(preset, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        place = raw if key in raw else raw["config"]
        place[key] = value
        if value == "absent":
            del place[key]
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no_text_model": ({"class_name": "ResNetBackbone"}, "expected a text model.*'ResNetBackbone'"),
    "unknown_argument": ({"use_magic": True}, r"use_magic=True \(unknown\)"),
    "missing_argument": ({"hidden_dim": "absent"}, r"hidden_dim \(missing\)"),
    "of_another_type": ({"num_layers": "two"}, "positive integer for num_layers"),
    "a_word": ({"rope_low_freq_factor": "low"}, "expected a number"),
    "half_a_group": ({"rope_low_freq_factor": None}, r"rope_high_freq_factor=4.0 \(expected None"),
    "no_arguments": ({"config": [1]}, "arguments of a class"),
    "quantized": (
        {"dtype": {"class_name": "DTypePolicyMap", "config": {}, "module": "keras"}},
        "floating point",
    ),
    "other_sizes": ({"intermediate_dim": 81}, "8 differences|6 differences"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name: str, preset: Path, tmp_path: Path) -> None:
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        flm.Backbone.from_preset(changed(preset, tmp_path, **changes))


_SU = {"rope_scaling_type": "su", "rope_scaling_short_factor": [1.0] * 6}
BAD_ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown_scaling": ("phi3", {"rope_scaling_type": "yarn"}, "rope_scaling_type='yarn'"),
    "scaling_without_factors": ("phi3", _SU, "rope_scaling_type='su'"),
    "factors_of_a_word": ("phi3", {**_SU, "rope_scaling_long_factor": "x"}, "list of numbers"),
    "bloom_mlp": ("bloom", {"intermediate_dim": 80}, "intermediate_dim=80 .expected 192"),
    "gemma3n_widths": ("gemma3n", {"intermediate_size": [8]}, "for each of 4 layers, a width"),
    "gemma3n_lender": ("gemma3n", {"num_kv_shared_layers": 3}, "one of each type"),
    "gemma3n_rope": ("gemma3n", {"rope_scaling": 2.0}, "rope_scaling=2.0 .expected None"),
    "gemma3n_act": ("gemma3n", {"hidden_activation": "gelu"}, "expected 'gelu_approximate'"),
    "no_heads": ("gpt_neox", {"num_heads": 0}, "positive integer for num_heads"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    model, changes, message = BAD_ARGUMENTS[name]
    kind, arguments, _ = MODELS[model]
    with pytest.raises(ValueError, match=message):
        read_arguments(kind, arguments | changes, True, FAMILIES, "config.json")


def test_bad_files(preset: Path, tmp_path: Path) -> None:
    folder = changed(preset, tmp_path)
    (folder / "task.json").write_text('{"class_name": "Llama3TextClassifier"}')
    with pytest.raises(ValueError, match="CausalLM.*'Llama3TextClassifier'"):
        flm.Backbone.from_preset(folder)
    (folder / "task.json").unlink()
    weights = folder / "model.weights.h5"
    with h5py.File(weights, "a") as file:
        file["layers/llama_layer_norm/vars/1"] = np.zeros(3)
    with pytest.raises(ValueError, match="unknown tensor 'layers/llama_layer_norm/vars/1'"):
        flm.Backbone.from_preset(folder)
    with h5py.File(weights, "a") as file:
        file.move("layers", "_layer_checkpoint_dependencies")
    with pytest.raises(ValueError, match="an older version"):
        flm.Backbone.from_preset(folder)
    weights.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="malformed"):
        flm.Backbone.from_preset(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.weights.h5"):
        flm.Backbone.from_preset(folder)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        flm.Tokenizer.from_preset(folder)


def test_bad_models_in_memory() -> None:
    with pytest.raises(ValueError, match="Expected a KerasHub backbone"):
        flm.from_keras_hub(keras.Sequential([keras.layers.Dense(2)]))
    hub = make_hub("gpt2")
    hub.quantize("int8", filters="query")
    with pytest.raises(ValueError, match="quantized to int8"):
        flm.from_keras_hub(hub)
    with pytest.raises(ValueError, match="class_name to be one of"):
        flm.to_keras_hub(flm.from_keras_hub(make_hub("gpt2")), "GemmaBackbone")


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = flm.from_keras_hub(make_hub("gpt2"))
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(ImportError, match="pip install keras-hub"):
        flm.to_keras_hub(ours)
    with pytest.raises(ImportError, match="pip install keras-hub"):
        flm.Backbone.from_preset("kaggle://keras/gpt2/keras/gpt2_base_en")
    with pytest.raises(ValueError, match="organisation/model/keras/variant"):
        flm.Backbone.from_preset("kaggle://keras/gpt2")


def test_kaggle_gives_the_folder(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver is another's; what it gives is a preset directory."""
    asked: list[str] = []
    kagglehub = ModuleType("kagglehub")
    kagglehub.model_download = lambda handle: asked.append(handle) or str(preset)  # type: ignore
    monkeypatch.setitem(sys.modules, "kagglehub", kagglehub)
    model = flm.Backbone.from_preset("kaggle://keras/llama3/keras/tiny/2", load_weights=False)
    assert asked == ["keras/llama3/keras/tiny/2"]
    assert model.config.hidden_dim == 48
