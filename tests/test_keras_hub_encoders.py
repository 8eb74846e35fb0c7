"""KerasHub's models with encoders of images and sounds, of which the text model is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import functional_llm as flm
from functional_llm.graph.keras_values import uninitialized
from functional_llm.presets.keras_hub_writing import save_keras_hub_preset
from hub_models import (
    IDS,
    MODELS,
    UNREAD,
    assert_same,
    hub_logits,
    keras_hub,
    promoting,
    values,
)
from test_keras_hub_tokenizers import GEMMA3N, GEMMA4, sentences

_WIDTH = 48  # of the text models
_VIT = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
_IMAGE = {"image_size": 8, "patch_size": 4, "pool_size": 2, "output_dim": _WIDTH}


def _gemma3() -> Any:
    encoder = keras_hub.models.Gemma3VisionEncoder(**_VIT, **_IMAGE)
    sizes = MODELS["gemma3"][1] | {"num_layers": 1, "image_size": 8}
    return keras_hub.models.Gemma3Backbone(**sizes, vision_encoder=encoder)


def _gemma3n() -> Any:
    """With embeddings of 8 tokens each of images and of sounds behind the text's."""
    from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise

    vision = keras_hub.models.MobileNetV5Backbone(
        **convert_arch_def_to_stackwise([["er_r1_k3_s1_e1_c16"]]),
        num_features=4,
        image_shape=(8, 8, 3),
        use_msfa=False,
    )
    audio = {
        "hidden_size": 8,
        "input_feat_size": 8,
        "sscp_conv_channel_size": [4, 8],
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        "sscp_conv_group_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1.0,
        "residual_weight": 0.5,
        "num_attention_heads": 1,
        "attention_chunk_size": 4,
        "num_attention_context_right": 5,
        "num_attention_context_left": 5,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 5,
        "reduction_factor": 1,
    }
    return keras_hub.models.Gemma3nBackbone(
        **MODELS["gemma3n"][1],
        vision_encoder_config=vision.get_config(),
        vision_hidden_size=16,
        vision_vocab_offset=128,
        vision_vocab_size=8,
        audio_encoder_config=audio,
        audio_hidden_size=8,
        audio_vocab_offset=136,
        audio_vocab_size=8,
    )


def _gemma4() -> Any:
    from keras_hub.src.models.gemma4.gemma4_audio_encoder import Gemma4AudioEncoder
    from keras_hub.src.models.gemma4.gemma4_vision_encoder import Gemma4VisionEncoder

    vision = Gemma4VisionEncoder(**_VIT, **_IMAGE, head_dim=4, position_embedding_size=4)
    audio = Gemma4AudioEncoder(
        input_feat_size=16,
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        chunk_size=4,
        context_left=5,
        sscp_conv_channels=(4, 8),
        output_proj_dims=8,
        output_dim=_WIDTH,
    )
    sizes = MODELS["gemma4"][1] | {"image_size": 8}
    return keras_hub.models.Gemma4Backbone(**sizes, vision_encoder=vision, audio_encoder=audio)


def _qwen3_5(name: str = "qwen3_5") -> Any:
    from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import Qwen3_5VisionEncoder

    encoder = Qwen3_5VisionEncoder(
        depth=1,
        hidden_size=8,
        num_heads=2,
        intermediate_size=12,
        patch_size=4,
        out_hidden_size=_WIDTH,
        num_position_embeddings=16,
    )
    kind, sizes, _ = MODELS[name]
    make = getattr(keras_hub.models, kind)
    return make(**sizes, vision_encoder=encoder, mrope_section=[1, 1, 0])


MAKERS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": lambda: _qwen3_5("qwen3_5_moe"),
}


# The special tokens of their tokenizers, beside those of `sentences`.
SENTENCES = {
    "gemma3": ["<img>", "<start_of_image>", "<end_of_image>"],
    "gemma3n": GEMMA3N.split(),
    "gemma4": GEMMA4.split(),
}


def make_with_encoders(name: str) -> Any:
    """Returns a random KerasHub backbone, without the time that its own initialisers take."""
    with promoting(), uninitialized():
        model = MAKERS[name]()
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.standard_normal(weight.shape) * 0.1 + (len(weight.shape) == 1))
    return model


@pytest.mark.filterwarnings("ignore:The `generate` of KerasHub:UserWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_all_but_the_encoders_is_read(name: str, tmp_path: Path) -> None:
    """In memory, and from a preset; what goes back is KerasHub's text model."""
    theirs = make_with_encoders(name)
    ours = flm.from_keras_hub(theirs)
    theirs.save_to_preset(tmp_path)
    assert_same(flm.Backbone.from_preset(tmp_path), ours)
    expected, back = values(theirs), values(flm.to_keras_hub(ours))
    assert back.keys() < expected.keys()
    for path, value in back.items():
        if not UNREAD.search(path):
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


# What a model with encoders is given beside text: no images, and no sounds.
NOTHING: dict[str, dict[str, np.ndarray]] = {
    "gemma3": {
        "images": np.zeros((2, 0, 8, 8, 3), "float32"),
        "vision_indices": np.zeros((2, 0), "int32"),
        "vision_mask": np.zeros_like(IDS),
    },
    "gemma3n": {
        "images": np.zeros((2, 0, 8, 8, 3), "float32"),
        "input_features": np.zeros((2, 0, 0, 8), "float32"),
        "input_features_mask": np.zeros((2, 0, 0), "bool"),
    },
    "gemma4": {
        "pixel_values": np.zeros((2, 0, 4, 48), "float32"),
        "pixel_position_ids": np.zeros((2, 0, 4, 2), "int32"),
        "vision_indices": np.zeros((2, 0), "int32"),
        "vision_mask": np.zeros_like(IDS),
        "audio_indices": np.zeros((2, 0), "int32"),
        "audio_mask": np.zeros_like(IDS),
        "audio_mel": np.zeros((2, 0, 8, 16), "float32"),
        "audio_mel_mask": np.zeros((2, 0, 8), "int32"),
    },
    "qwen3_5": {
        "pixel_values": np.zeros((2, 0, 2, 4, 4, 3), "float32"),
        "image_grid_thw": np.zeros((2, 0, 3), "int32"),
        "vision_indices": np.zeros((2, 0), "int32"),
    },
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", NOTHING)
def test_text_alone_has_the_same_logits(name: str) -> None:
    theirs = make_with_encoders(name)
    ours = np.asarray(flm.from_keras_hub(theirs)(IDS))
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours, hub_logits(theirs, **NOTHING[name]), atol=1e-4)


@pytest.mark.nightly(unless=lambda parameters: parameters["name"] == "gemma3")
@pytest.mark.parametrize("name", SENTENCES)
def test_the_text_model_is_written_with_its_tokenizer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorFlow, which Gemma's preprocessors want before they need it."""
    module = f"keras_hub.src.models.{name}.{name}_causal_lm_preprocessor"
    monkeypatch.setattr(f"{module}.assert_tf_installed", lambda _: None)
    kind = MODELS[name][0].removesuffix("Backbone")
    tokenizer = getattr(keras_hub.tokenizers, f"{kind}Tokenizer")(sentences(*SENTENCES[name]))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    make_with_encoders(name).save_to_preset(theirs)
    tokenizer.save_to_preset(theirs)
    model = flm.Backbone.from_preset(theirs)
    save_keras_hub_preset(model, ours)
    for file, part in (("task", "CausalLM"), ("tokenizer", "Tokenizer"), ("config", "Backbone")):
        assert json.loads((ours / f"{file}.json").read_text())["class_name"] == f"{kind}{part}"
    assert_same(flm.Backbone.from_preset(ours), model)
    assert flm.Tokenizer.from_preset(ours).stop_token_ids > {tokenizer.end_token_id}


def test_only_the_encoders_that_the_arguments_name_are_skipped(tmp_path: Path) -> None:
    make_with_encoders("gemma3").save_to_preset(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())

    def load(**changes: Any) -> None:
        changed = {**raw, "config": {**raw["config"], **changes}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        flm.Backbone.from_preset(tmp_path)

    with pytest.raises(ValueError, match="unknown tensor 'layers/gemma3_vision_encoder/"):
        load(vision_encoder=None)
    with pytest.raises(ValueError, match="vision_encoder=True .expected the config of an encoder"):
        load(vision_encoder=True)
    with pytest.raises(ValueError, match=r"audio_encoder={} .unknown"):
        load(audio_encoder={})
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        file["layers/gemma3_vision_encoder_1/vars/0"] = np.zeros(3)
    with pytest.raises(ValueError, match="unknown tensor 'layers/gemma3_vision_encoder_1/vars/0'"):
        load()
