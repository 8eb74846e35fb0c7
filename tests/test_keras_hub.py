"""KerasHub's models to ours and back: in memory, and as preset directories."""

import inspect
import json
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import jax
import keras
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.keras_hub import REQUIRED
from functional_llm.formats.keras_hub_config import IRRELEVANT
from reference import reference_logits

keras_hub = pytest.importorskip("keras_hub", reason="make .venv/installed-dev installs it")

_SIZES = {"vocabulary_size": 128, "num_layers": 2, "hidden_dim": 48, "intermediate_dim": 80}
_HEADS = {"num_query_heads": 4, "num_key_value_heads": 2}
_GEMMA = {
    **_SIZES,
    **_HEADS,
    "head_dim": 16,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 5,
    "final_logit_soft_cap": 3.0,
}
# Class of KerasHub, its arguments, and the family that it is here.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama3": (
        "Llama3Backbone",
        {
            **_SIZES,
            **_HEADS,
            "layer_norm_epsilon": 1e-5,
            "rope_max_wavelength": 500000,
            "rope_frequency_adjustment_factor": 8.0,
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0,
            "rope_pretraining_sequence_length": 16,
        },
        "llama",
    ),
    "llama_tied": (
        "LlamaBackbone",
        {**_SIZES, **_HEADS, "tie_word_embeddings": True},
        "llama",
    ),
    "mistral": ("MistralBackbone", {**_SIZES, **_HEADS, "sliding_window": 5}, "mistral"),
    "mistral_heads": (
        "MistralBackbone",
        {**_SIZES, **_HEADS, "sliding_window": None, "head_dim": 10, "rope_scaling_factor": 4.0},
        "mistral",
    ),
    "qwen": ("QwenBackbone", {**_SIZES, **_HEADS, "tie_word_embeddings": False}, "qwen2"),
    "qwen3": (
        "Qwen3Backbone",
        {**_SIZES, **_HEADS, "head_dim": 20, "sliding_window_size": None},
        "qwen3",
    ),
    "gemma": ("GemmaBackbone", {**_SIZES, **_HEADS, "head_dim": 16}, "gemma"),
    "gemma2": ("GemmaBackbone", {**_GEMMA, "attention_logit_soft_cap": 2.0}, "gemma2"),
    "gemma3": (
        "Gemma3Backbone",
        {**_GEMMA, "num_layers": 6, "image_size": None, "global_rope_scaling_factor": 8.0},
        "gemma3_text",
    ),
    "gpt2": ("GPT2Backbone", {**_SIZES, "num_heads": 4, "max_sequence_length": 64}, "gpt2"),
}
IDS = np.random.default_rng(0).integers(0, 128, (2, 24)).astype("int32")


def make_hub(name: str, **changes: Any) -> Any:
    """Returns a random KerasHub backbone; every weight is shaken, so that each counts."""
    kind, arguments, _ = MODELS[name]
    model = getattr(keras_hub.models, kind)(**{**arguments, **changes})
    generator = np.random.default_rng(1)
    for weight in model.weights:
        scale = 0.3 if "query" in weight.path or "key" in weight.path else 0.1
        noise = generator.standard_normal(weight.shape) * scale
        weight.assign(noise + (np.asarray(weight, "float32") if len(weight.shape) == 1 else 0))
    return model


def promoting() -> AbstractContextManager[Any]:
    """KerasHub adds integers to numbers, which the tests forbid."""
    return jax.numpy_dtype_promotion("standard")


def hub_logits(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with promoting():
        hidden = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        return np.asarray(model.token_embedding(hidden, reverse=True))


@pytest.fixture(scope="module", params=MODELS)
def hub(request: pytest.FixtureRequest) -> Any:
    """A KerasHub model, under its name."""
    return request.param, make_hub(request.param)


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {weight.path: np.asarray(weight) for weight in model.weights}


def assert_same(first: keras.Model, second: keras.Model) -> None:
    ours, theirs = values(first), values(second)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        np.testing.assert_array_equal(value, theirs[path], path)


def test_models_in_memory_compute_the_same_both_ways(hub: Any) -> None:
    name, theirs = hub
    ours = flm.from_keras_hub(theirs)
    assert type(ours.config).__module__.endswith(MODELS[name][2].removesuffix("_text"))
    expected = hub_logits(theirs)
    np.testing.assert_allclose(np.asarray(ours(IDS)), expected, atol=1e-4)
    back = flm.to_keras_hub(ours, MODELS[name][0])
    assert type(back) is type(theirs)
    assert_same(theirs, back)
    np.testing.assert_array_equal(hub_logits(back), expected)


def test_presets_are_read_without_a_difference(hub: Any, tmp_path: Path) -> None:
    name, theirs = hub
    theirs.save_to_preset(tmp_path)
    ours = flm.Backbone.from_preset(tmp_path)
    assert_same(ours, flm.from_keras_hub(theirs))
    shapes = flm.Backbone.from_preset(tmp_path, load_weights=False)
    assert shapes.config == ours.config


def task_of(model: Any) -> Any:
    """Returns the task of a KerasHub backbone that writes text, without a preprocessor."""
    name = type(model).__name__.replace("Backbone", "CausalLM")
    return getattr(keras_hub.models, name)(backbone=model, preprocessor=None)


def test_greedy_text_is_the_same() -> None:
    """Cached, token by token, in one model of each class: `generate` of both."""
    prompt, total = IDS[:1, :7], 16
    for name in ("llama3", "mistral", "qwen", "qwen3", "gemma2", "gemma3", "gpt2"):
        hub = make_hub(name)
        task = task_of(hub)
        task.compile(sampler="greedy")
        inputs = np.zeros((1, total), "int32"), np.zeros((1, total), "int32")
        inputs[0][:, : prompt.shape[1]], inputs[1][:, : prompt.shape[1]] = prompt, 1
        with promoting():
            write = task.make_generate_function()
            written = write({"token_ids": inputs[0], "padding_mask": inputs[1]})
        theirs = np.asarray(written["token_ids"])[0, prompt.shape[1] :].tolist()
        generator = flm.TextGenerator(flm.from_keras_hub(hub), None)
        (ours,) = generator.generate_ids(prompt.tolist(), max_new_tokens=len(theirs))
        assert list(ours) == theirs, name


def test_a_preset_of_ours_is_one_of_kerashubs(tmp_path: Path) -> None:
    """There and back, every bit; in several files; a task goes and comes as well."""
    ours = flm.from_keras_hub(make_hub("llama3"))
    task = task_of(flm.to_keras_hub(ours))
    task.save_to_preset(tmp_path / "task")
    assert_same(flm.Backbone.from_preset(tmp_path / "task"), ours)
    assert_same(flm.from_keras_hub(task), ours)
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "task"))
    assert_same(loaded, task.backbone)
    task.backbone.save_to_preset(tmp_path / "sharded", max_shard_size=4e-5)
    assert len(list((tmp_path / "sharded").glob("model_*.weights.h5"))) > 3
    assert_same(flm.Backbone.from_preset(tmp_path / "sharded"), ours)
    assert_same(flm.from_keras_hub(tmp_path / "sharded"), ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    hub = make_hub("gemma", dtype=dtype)
    ours = flm.from_keras_hub(hub)
    assert {str(weight.dtype) for weight in ours.weights} == {str(hub.weights[0].dtype)}
    assert ours.product_dtype == "bfloat16"
    back = flm.to_keras_hub(ours)
    assert back.dtype_policy.name == dtype
    assert_same(back, hub)
    hub.save_to_preset(tmp_path)
    assert_same(flm.Backbone.from_preset(tmp_path, dtype=dtype), ours)


def test_training_one_leaves_the_other() -> None:
    """A step of Keras writes into the weights, and takes their old values away."""
    hub = make_hub("llama3")
    ours = flm.from_keras_hub(hub)
    before = values(ours)
    task = task_of(hub)
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    with promoting():
        task.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        task.train_on_batch(inputs, IDS)
    for path, value in values(ours).items():
        np.testing.assert_array_equal(value, before[path])
    trained = values(hub)
    ours.compile("sgd")
    ours.fit(IDS, verbose=0)
    for path, value in values(hub).items():
        np.testing.assert_array_equal(value, trained[path])


def shake_lora(hub: Any) -> None:
    generator = np.random.default_rng(2)
    for weight in hub.trainable_weights:
        if "lora" in weight.path:
            weight.assign(generator.standard_normal(weight.shape) * 0.2)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gpt2"])
def test_adapters_of_kerashub_are_merged(name: str, tmp_path: Path) -> None:
    """In memory, in the preset of such a model, and out of its own file."""
    hub = make_hub(name)
    plain = flm.from_keras_hub(hub)
    hub.enable_lora(3)
    shake_lora(hub)
    expected = hub_logits(hub)
    ours = flm.from_keras_hub(hub)
    np.testing.assert_allclose(np.asarray(ours(IDS)), expected, atol=1e-4)
    assert np.abs(np.asarray(plain(IDS)) - expected).max() > 1e-2
    hub.save_to_preset(tmp_path / "preset")
    assert_same(flm.Backbone.from_preset(tmp_path / "preset"), ours)
    hub.save_lora_weights(str(tmp_path / "x.lora.h5"))
    make_hub(name).save_to_preset(tmp_path / "plain")
    assert_same(flm.from_keras_hub(tmp_path / "plain", lora=tmp_path / "x.lora.h5"), ours)


def test_adapters_that_were_counted_otherwise_are_refused(tmp_path: Path) -> None:
    """keras-hub#2701: KerasHub loads them into whatever layers have these numbers."""
    hub = make_hub("gpt2")
    hub.enable_lora(3, target_layer_names=["query", "key", "value"])
    path = tmp_path / "x.lora.h5"
    for changed, match in (([9, 10, 11, 19, 20], "other adapters"), ([3], "cannot have LoRA")):
        hub._lora_enabled_layers = [i for i in changed if i > 3]
        if changed == [3]:
            hub._lora_enabled_layers = [9]
        hub.save_lora_weights(str(path))
        if changed == [3]:
            with h5py.File(path, "a") as file:
                file.move("lora/9", "lora/3")
        with pytest.raises(ValueError, match=match):
            flm.from_keras_hub(hub, lora=path)
    with pytest.raises(ValueError, match="save_lora_weights"):
        flm.from_keras_hub(hub, lora=__file__)


def test_adapters_of_ours_travel_merged() -> None:
    ours = flm.from_keras_hub(make_hub("llama3"))
    adapted = flm.peft.lora(ours, rank=2)
    for weight in adapted.trainable_weights:
        weight.assign(weight + 0.05)
    with pytest.raises(ValueError, match="Merge adapters first"):
        flm.to_keras_hub(adapted)
    back = flm.to_keras_hub(flm.peft.merge(adapted))
    np.testing.assert_allclose(hub_logits(back), np.asarray(adapted(IDS)), atol=1e-4)
    with pytest.raises(ValueError, match="was rewired|does not fit"):
        flm.to_keras_hub(flm.quantize(ours, "int8"))


def test_the_column_has_the_arguments_and_defaults_of_the_classes() -> None:
    for family in FAMILIES.values():
        for name in family.keras_hub.classes if family.keras_hub else ():
            signature = inspect.signature(getattr(keras_hub.models, name).__init__)
            theirs = {
                key: REQUIRED if x.default is x.empty else x.default
                for key, x in signature.parameters.items()
                if x.kind is x.POSITIONAL_OR_KEYWORD and key not in {"self", *IRRELEVANT}
            }
            assert family.keras_hub is not None
            ours = dict(family.keras_hub.arguments)
            if name == "Gemma3Backbone":
                ours["image_size"] = REQUIRED  # of the class only: files may leave it out
            assert ours == theirs, name


# Where KerasHub computes something else than Transformers.


def assert_ours_is_transformers(ours: Any, folder: Path, expected: np.ndarray) -> None:
    """Checks that our logits are those of Transformers, and that KerasHub's are not."""
    import transformers

    ours.save_preset(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    logits = np.asarray(ours(IDS))
    np.testing.assert_allclose(logits, reference_logits(reference, IDS), atol=1e-4)
    assert np.abs(logits - expected).max() > 1e-3


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2_scales_scores_by_the_head_size": (
        "gemma2",
        {"query_head_dim_normalize": False},
        "scales scores by the head size 16 instead of 12",
    ),
    "gemma3_scales_scores_by_the_head_size": (
        "gemma3",
        {"query_head_dim_normalize": False},
        "scales scores by the head size 16 instead of 12",
    ),
    "gemma_norms_of_layers_keep_their_epsilon": (
        "gemma",
        {"layer_norm_epsilon": 0.1},
        "an epsilon of 1e-6",
    ),
    "llama_ignores_the_factor_on_positions": (
        "llama3",
        {
            "rope_frequency_adjustment_factor": None,
            "rope_low_freq_factor": None,
            "rope_high_freq_factor": None,
            "rope_pretraining_sequence_length": None,
            "rope_position_scaling_factor": 4.0,
        },
        "ignores rope_position_scaling_factor",
    ),
    "qwen_has_no_window_on_jax": (
        "qwen",
        {"use_sliding_window_attention": True, "sliding_window_size": 5},
        "no window",
    ),
    "qwen3_has_no_window_on_jax": ("qwen3", {"sliding_window_size": 5}, "no window"),
}


@pytest.mark.parametrize("name", WRONG)
def test_kerashub_differs_from_transformers(name: str, tmp_path: Path) -> None:
    model, changes, message = WRONG[name]
    hub = make_hub(model, **changes)
    with pytest.warns(UserWarning, match=message):
        ours = flm.from_keras_hub(hub)
    assert_ours_is_transformers(ours, tmp_path / "hf", hub_logits(hub))
    with pytest.raises(ValueError, match=message):
        flm.to_keras_hub(ours)


def test_kerashubs_saved_llama_forgets_that_its_head_is_tied(tmp_path: Path) -> None:
    hub = make_hub("llama_tied")
    hub.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="variables"):
        keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert flm.Backbone.from_preset(tmp_path).config.tie_word_embeddings


def test_kerashub_reads_neither_epsilon_nor_stretched_rope_of_a_llama(tmp_path: Path) -> None:
    """Out of a directory that Transformers 5 has written."""
    from configs import CONFIGS
    from reference import save_reference

    rope = CONFIGS["llama_llama3"]["rope_parameters"]
    save_reference({**CONFIGS["llama_llama3"], "rms_norm_eps": 1e-5}, tmp_path)
    hub = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert hub.rope_frequency_adjustment_factor is None
    assert hub.layer_norm_epsilon == 1e-6
    right = flm.to_keras_hub(flm.Backbone.from_preset(tmp_path))
    assert right.rope_frequency_adjustment_factor == rope["factor"]
    assert right.layer_norm_epsilon == 1e-5


# What cannot go, and bad input.


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama_head_size": ("llama_head_size", {}, "it cannot say head_dim=18"),
    "llama_biases": ("llama_biases", {}, "activation='gelu'.*attention_bias=True"),
    "llama_yarn": ("llama_yarn", {}, "rope_scaling"),
    "mistral_tied": ("mistral_window", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "qwen2_some_layers_slide": ("qwen2_some_layers_slide", {}, "layer_types"),
    "gemma_untied": ("gemma_untied_multi_head", {}, "tie_word_embeddings=False"),
    "gemma2_scale": ("gemma2_soft_caps", {}, "query_pre_attention_scalar=24"),
    "gemma3_ropes": ("gemma3_two_ropes", {}, "rope_max_wavelength=50000.0.*layer_types"),
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
    from configs import CONFIGS

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
    with pytest.raises(ImportError, match=r"functional-llm\[hub\]"):
        flm.to_keras_hub(ours)
    with pytest.raises(ImportError, match=r"functional-llm\[hub\]"):
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
