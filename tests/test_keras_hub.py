"""KerasHub's models to ours and back: in memory, and as preset directories."""

from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.presets.keras_hub_writing import save_keras_hub_preset
from functional_llm.tokenizers import TextTokenizer
from hub_models import (
    IDS,
    MODELS,
    ONE_WAY,
    assert_same,
    hub_logits,
    hub_text,
    keras_hub,
    make_hub,
    promoting,
    task_of,
    values,
)
from pair import compiled
from test_keras_hub_tokenizers import byte_pairs
from test_recipes import blocks
from test_world_tokenizer import write_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package is not installed")
# A kind of column each: `make test` takes these both ways, and reads the presets of all.
KINDS = (
    "llama3",
    "gemma2",
    "gpt2",
    "gemma3n",
    "qwen3_moe",
    "phi3",
    "gpt_oss",
    "bloom",
    "qwen3_5",
    "rwkv7",
)
both_ways = pytest.mark.nightly(unless=lambda parameters: parameters["hub"] in KINDS)


@pytest.fixture(scope="module", params=MODELS)
def hub(request: pytest.FixtureRequest) -> Any:
    """A KerasHub model, under its name."""
    return request.param, make_hub(request.param)


@both_ways
@pytest.mark.filterwarnings("ignore:The `generate` of KerasHub:UserWarning")
def test_models_in_memory_compute_the_same_both_ways(hub: Any) -> None:
    name, theirs = hub
    ours = flm.from_keras_hub(theirs)
    assert type(ours.config).__module__.endswith(MODELS[name][2].removesuffix("_text"))
    expected = hub_logits(theirs)
    np.testing.assert_allclose(compiled(ours)(IDS), expected, atol=1e-4)
    with promoting():
        back = flm.to_keras_hub(ours, MODELS[name][0])
    assert type(back) is type(theirs)
    assert_same(theirs, back)
    # SmolLM3's frequencies are weights there, and a result of ours here.
    atol = 1e-6 if name == "smollm3" else 0
    np.testing.assert_allclose(hub_logits(back), expected, rtol=0, atol=atol)


def test_presets_are_read_without_a_difference(hub: Any, tmp_path: Path) -> None:
    name, theirs = hub
    theirs.save_to_preset(tmp_path)
    ours = flm.Backbone.from_preset(tmp_path)
    assert_same(ours, flm.from_keras_hub(theirs))
    shapes = flm.Backbone.from_preset(tmp_path, load_weights=False)
    assert shapes.config == ours.config


@pytest.mark.filterwarnings("ignore:.*computes otherwise than the model's authors:UserWarning")
@pytest.mark.parametrize("name", ONE_WAY)
def test_presets_of_models_that_kerashub_computes_otherwise(name: str, tmp_path: Path) -> None:
    theirs = make_hub(name)
    theirs.save_to_preset(tmp_path)
    ours = flm.Backbone.from_preset(tmp_path)
    assert_same(ours, flm.from_keras_hub(theirs))
    assert type(ours.config).__module__.endswith(ONE_WAY[name][2])


@pytest.mark.nightly
def test_greedy_text_is_the_same() -> None:
    """Cached, token by token, in one model of each class: `generate` of both."""
    prompt, total = IDS[:1, :7], 16
    names = ["llama3", "mistral", "qwen", "qwen3", "gemma2", "gemma3", "gpt2", "smollm3"]
    names += ["bloom", "opt", "phi3", "gpt_oss", "mixtral", "qwen_moe", "qwen3_moe"]
    names += ["gemma3n"]
    for name in names:
        hub = make_hub(name)
        theirs = hub_text(hub, prompt, total)
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
    with pytest.raises(ValueError, match="Expected a model in floating point"):
        flm.to_keras_hub(flm.quantize(ours, "int8"))


def test_the_page_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>"]
    vocabulary, merges = byte_pairs(tmp_path / "hf", *names)
    tokenizer = keras_hub.tokenizers.Llama3Tokenizer(vocabulary, merges)
    task = keras_hub.models.Llama3CausalLM(
        make_hub("llama3", vocabulary_size=len(vocabulary)),
        keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=16),
    )
    task.save_to_preset(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"hub_preset": str(tmp_path / "hub")}
    for block in blocks(repository / "docs" / "keras_hub.md"):
        exec(compile(block, "docs/keras_hub.md", "exec"), found)
    assert isinstance(found["text"], str)
    assert_same(flm.Backbone.from_preset("hub_directory"), found["merged"])
    with promoting():
        found["new_task"].compile(sampler="greedy")
        written = found["new_task"].generate("The quick", max_length=10)
    prompt = found["tokenizer"].encode("The quick", add_bos=True)
    (ours,) = flm.TextGenerator(found["merged"], None).generate_ids(
        [prompt], max_new_tokens=10 - len(prompt)
    )
    assert written == found["tokenizer"].decode([*prompt, *ours], skip_special_tokens=True)


def test_a_world_vocabulary_is_not_written_and_the_model_is(tmp_path: Path) -> None:
    ours = flm.from_keras_hub(make_hub("rwkv7"))
    write_vocabulary(tmp_path)
    tokenizer = TextTokenizer.from_directory(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer: KerasHub's RWKVTokenizer is not written"):
        save_keras_hub_preset(ours, tmp_path / "preset", tokenizer)
    assert not (tmp_path / "preset" / "tokenizer.json").exists()
    assert_same(flm.Backbone.from_preset(tmp_path / "preset"), ours)


def test_heads_of_another_size_have_another_epsilon_in_keras_hub() -> None:
    with pytest.warns(UserWarning, match="the epsilon of the norm of heads is 64e-5"):
        ours = flm.from_keras_hub(make_hub("rwkv7", head_size=32))
    with pytest.raises(ValueError, match="the epsilon of the norm of heads is 64e-5"):
        flm.to_keras_hub(ours)
