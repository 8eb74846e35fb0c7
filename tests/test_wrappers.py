"""Text models inside checkpoints of several models, as Gemma 3 and Mistral 3 are published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import functional_llm as flm
from configs import CONFIGS
from functional_llm.presets.sources import open_source

IDS = np.random.default_rng(0).integers(0, 128, (2, 20)).astype("int32")
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_PATCHES = {"pooling_kernel_size": 1, "num_key_value_heads": 2, "head_dim": 8}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3", "gemma3_two_ropes", {"model_type": "siglip_vision_model"}),
    "ministral3": ("mistral3", "ministral3_growing_queries", {"model_type": "pixtral"}),
    "llama4": ("llama4", "llama4_chunks_then_all", {}),
    "gemma4": ("gemma4", "gemma4_shared_keys", {"model_type": "gemma4_vision", **_PATCHES}),
    "gemma4_unified": ("gemma4_unified", "gemma4_values_are_keys", {}),
    "mistral_small": ("mistral3", "mistral_no_window_head_size", {"model_type": "pixtral"}),
}


def make_wrapped(case: str, tied: bool) -> Any:
    """Returns a random Transformers model of images and text."""
    wrapper, name, vision = CASES[case]
    text = {**CONFIGS[name], "tie_word_embeddings": tied}
    if wrapper == "gemma4_unified":
        text["model_type"] = "gemma4_unified_text"
    config = transformers.AutoConfig.for_model(
        wrapper,
        text_config=text,
        vision_config={**_VISION, **vision},
        tie_word_embeddings=tied,
        mm_tokens_per_image=1,
        image_token_index=127,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_the_text_model_of_a_wrapper(case: str, tied: bool, tmp_path: Path) -> None:
    model = make_wrapped(case, tied)
    model.save_pretrained(tmp_path / "wrapped")
    ids = np.minimum(IDS, 126)  # not the image token
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    backbone = flm.Backbone.from_preset(tmp_path / "wrapped")
    assert backbone.config.tie_word_embeddings == tied
    np.testing.assert_allclose(backbone(ids), expected, atol=1e-4)

    # It is saved as the text model, which Transformers loads as such.
    backbone.save_preset(tmp_path / "text")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        again = text(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(again, expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["published", "bare"])
def test_other_names_of_the_same_tensors(layout: str, tmp_path: Path) -> None:
    model = make_wrapped("gemma3", True)
    model.save_pretrained(tmp_path)
    expected = flm.Backbone.from_preset(tmp_path)(IDS)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    new = {"published": "language_model.model.", "bare": "model.language_model."}[layout]
    for old in ("language_model.model.", "model.language_model."):
        tensors = {
            (new + name.removeprefix(old) if name.startswith(old) else name): x
            for name, x in tensors.items()
        }
    assert any(name.startswith(new) for name in tensors)
    assert any("vision_tower" in name for name in tensors)
    safetensors.numpy.save_file(tensors, path)
    np.testing.assert_array_equal(flm.Backbone.from_preset(tmp_path)(IDS), expected)


def test_gemma3_4b_as_it_is_published(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read: Any = open_source(tmp_path).config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    assert read.vocabulary_size == theirs.vocab_size == 262208
    assert (read.num_query_heads, read.num_key_value_heads, read.head_dim) == (8, 4, 256)
    assert list(read.layer_types) == theirs.layer_types and read.tie_word_embeddings
    assert read.max_sequence_length == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "mllama_text_model"}, "text_config.model_type is 'mllama_text_model'"),
        ({"hidden_size": 8, "vision_feature": 3}, "vision_feature=3"),
        (None, "expected the keys of the text model as text_config, received None"),
    ],
    ids=["an_unknown_text_model", "an_unknown_key", "no_text_model"],
)
def test_refused(text: Any, message: str, tmp_path: Path) -> None:
    keys = CONFIGS["mistral_window"] | (text or {})
    config = {"model_type": "mistral3", "text_config": keys if text else None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        flm.Backbone.from_preset(tmp_path, load_weights=False)


def test_a_tensor_that_no_rule_skips_is_named(tmp_path: Path) -> None:
    make_wrapped("gemma3", True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "audio_tower.weight": IDS}, path)
    with pytest.raises(ValueError, match="unknown tensor 'audio_tower.weight'"):
        flm.Backbone.from_preset(tmp_path)
