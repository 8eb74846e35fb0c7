"""Tiny random models of KerasHub, one of each class that this library has."""

import re
from contextlib import AbstractContextManager
from typing import Any

import jax
import keras
import numpy as np
import pytest

keras_hub = pytest.importorskip("keras_hub", reason="make .venv/installed-dev installs it")

_SIZES = {"vocabulary_size": 128, "num_layers": 2, "hidden_dim": 48, "intermediate_dim": 80}
_HEADS = {"num_query_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 6, "moe_intermediate_dim": 24}
_NETS = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
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
    "mixtral": (
        "MixtralBackbone",
        {**_SIZES, **_HEADS, "num_experts": 5, "sliding_window": 5},
        "mixtral",
    ),
    "qwen": ("QwenBackbone", {**_SIZES, **_HEADS, "tie_word_embeddings": False}, "qwen2"),
    "qwen3": (
        "Qwen3Backbone",
        {**_SIZES, **_HEADS, "head_dim": 20, "sliding_window_size": None},
        "qwen3",
    ),
    "qwen_moe": (
        "QwenMoeBackbone",
        {**_SIZES, **_HEADS, **_EXPERTS, "shared_expert_intermediate_dim": 40, "top_k": 2},
        "qwen2_moe",
    ),
    "qwen3_moe": (
        "Qwen3MoeBackbone",
        {
            **_SIZES,
            **_HEADS,
            **_EXPERTS,
            "head_dim": 20,
            "top_k": 1,
            "norm_top_k_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "sliding_window_size": None,
        },
        "qwen3_moe",
    ),
    "qwen3_5": ("Qwen3_5Backbone", {**_SIZES, **_HEADS, **_NETS}, "qwen3_5_text"),
    "qwen3_5_moe": (
        "Qwen3_5MoeBackbone",
        {
            **{name: x for name, x in _SIZES.items() if name != "intermediate_dim"},
            **_HEADS,
            **_EXPERTS,
            **_NETS,
            "top_k": 2,
            "shared_expert_intermediate_size": 40,
            "tie_word_embeddings": True,
        },
        "qwen3_5_moe_text",
    ),
    "gemma": ("GemmaBackbone", {**_SIZES, **_HEADS, "head_dim": 16}, "gemma"),
    "gemma2": ("GemmaBackbone", {**_GEMMA, "attention_logit_soft_cap": 2.0}, "gemma2"),
    "gemma3": (
        "Gemma3Backbone",
        {**_GEMMA, "num_layers": 6, "image_size": None, "global_rope_scaling_factor": 8.0},
        "gemma3_text",
    ),
    "gemma4": (
        "Gemma4Backbone",
        {
            **_SIZES,
            **_HEADS,
            "num_layers": 4,
            "head_dim": 8,
            "image_size": None,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
            "sliding_window_size": 5,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 6,
            "global_rope_partial_rotary_factor": 0.5,
            "final_logit_soft_cap": 3.0,
        },
        "gemma4_text",
    ),
    "gemma4_experts": (
        "Gemma4Backbone",
        {
            **_SIZES,
            **_HEADS,
            "head_dim": 8,
            "image_size": None,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 5,
            "expert_intermediate_dim": 12,
            "num_experts_per_token": 2,
        },
        "gemma4_text",
    ),
    "gemma3n": (
        "Gemma3nBackbone",
        {
            "text_vocab_size": 128,
            "text_hidden_size": 48,
            "num_hidden_layers": 4,
            "pad_token_id": 0,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": [80, 40, 80, 24],
            "hidden_activation": "gelu_approximate",
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 5,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 700.0,
            "max_position_embeddings": 64,
            "vocab_size_per_layer_input": 120,  # some ids are beyond it
            "hidden_size_per_layer_input": 6,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "laurel_rank": 5,
            "activation_sparsity_pattern": [0.8, 0.0, 0.3, 0.0],
            "num_kv_shared_layers": 2,
            "final_logit_soft_cap": 3.0,
            "rms_norm_eps": 1e-3,
        },
        "gemma3n_text",
    ),
    "gpt2": ("GPT2Backbone", {**_SIZES, "num_heads": 4, "max_sequence_length": 64}, "gpt2"),
    "bloom": (
        "BloomBackbone",
        {**_SIZES, "intermediate_dim": 192, "num_heads": 6, "layer_norm_epsilon": 1e-3},
        "bloom",
    ),
    "opt": ("OPTBackbone", {**_SIZES, "num_heads": 4, "max_sequence_length": 64}, "opt"),
    "gpt_neox": (
        "GPTNeoXBackbone",
        {
            **_SIZES,
            "num_heads": 4,
            "rotary_percentage": 0.5,
            "rotary_max_wavelength": 700,
            "layer_norm_epsilon": 1e-3,
            "max_sequence_length": 64,
        },
        "gpt_neox",
    ),
    "phi3": ("Phi3Backbone", {**_SIZES, **_HEADS, "layer_norm_epsilon": 1e-5}, "phi3"),
    "phi3_long": (
        "Phi3Backbone",
        {
            **_SIZES,
            **_HEADS,
            "max_sequence_length": 64,
            "pretraining_sequence_length": 16,
            "rope_scaling_type": "su",
            "rope_scaling_short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "rope_scaling_long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 9.5],
        },
        "phi3",
    ),
    "gpt_oss": (
        "GptOssBackbone",
        {
            **_SIZES,
            **_HEADS,
            "head_dim": 10,
            "num_experts": 5,
            "rope_scaling_factor": 32.0,
            "sliding_window": None,
        },
        "gpt_oss",
    ),
    "rwkv7": (
        "RWKV7Backbone",
        {
            "vocabulary_size": 128,
            "num_layers": 2,
            "hidden_size": 128,
            "head_size": 64,  # for which alone KerasHub's epsilon is right
            "intermediate_dim": 80,
            "gate_lora": 5,
            "mv_lora": 3,
            "aaa_lora": 4,
            "decay_lora": 6,
        },
        "rwkv7",
    ),
    "smollm3": (
        "SmolLM3Backbone",
        {
            **_SIZES,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [False, True],
            "layer_types": ["full_attention", "full_attention"],
            "mlp_bias": True,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 64,
            "rope_theta": 5000.0,
            "partial_rotary_factor": 1.0,
        },
        "smollm3",
    ),
}
# Keys and values of the layers of a Gemma 3n that borrow them: to KerasHub they go as zeros.
UNREAD = re.compile(r"decoder_block_[23]/attention/[kv]_")
# KerasHub computes them otherwise, whatever their numbers: they come, and do not go.
ONE_WAY: dict[str, tuple[str, dict[str, Any], str]] = {
    # Twelve heads, as only slopes that are no powers of two are rounded at once.
    "falcon": ("FalconBackbone", {**_SIZES, "num_attention_heads": 12}, "falcon"),
}
IDS = np.random.default_rng(0).integers(0, 128, (2, 24)).astype("int32")


def make_hub(name: str, **changes: Any) -> Any:
    """Returns a random KerasHub backbone; every weight is shaken, so that each counts."""
    kind, arguments, _ = (MODELS | ONE_WAY)[name]
    with promoting():
        model = getattr(keras_hub.models, kind)(**{**arguments, **changes})
    generator = np.random.default_rng(1)
    for weight in model.trainable_weights:
        if UNREAD.search(weight.path):
            weight.assign(np.zeros(weight.shape))
            continue
        scale = 0.3 if "query" in weight.path or "key" in weight.path else 0.1
        noise = generator.standard_normal(weight.shape) * scale
        weight.assign(noise + (np.asarray(weight, "float32") if len(weight.shape) == 1 else 0))
    return model


def promoting() -> AbstractContextManager[Any]:
    """KerasHub adds integers to numbers, which the tests forbid."""
    return jax.numpy_dtype_promotion("standard")


def hub_logits(model: Any, ids: np.ndarray = IDS, **others: np.ndarray) -> np.ndarray:
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids), **others}
    if "position_ids" in model.input:
        inputs["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    with promoting():
        hidden = model(inputs)
        model = getattr(model, "language_model", model)  # of Gemma 3n
        if hasattr(model, "head"):  # RWKV-7's returns logits
            return np.asarray(hidden)
        return np.asarray(model.token_embedding(hidden, reverse=True))


def hub_text(model: Any, prompt: np.ndarray, total: int) -> list[int]:
    """Returns what KerasHub's `generate` writes behind one prompt, greedily, up to a length."""
    task, length = task_of(model), prompt.shape[1]
    task.compile(sampler="greedy")
    token_ids, mask = np.zeros((1, total), "int32"), np.zeros((1, total), "int32")
    token_ids[:, :length], mask[:, :length] = prompt, 1
    with promoting():
        written = task.make_generate_function()({"token_ids": token_ids, "padding_mask": mask})
    return [int(x) for x in np.asarray(written["token_ids"])[0, length:]]


# Layers that KerasHub gives no name, so that Keras counts them.
_COUNTED = re.compile(r"(_moe_block|_moe_mlp|group_normalization)_\d+")


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {_COUNTED.sub(r"\1", weight.path): np.asarray(weight) for weight in model.weights}


def assert_same(first: keras.Model, second: keras.Model) -> None:
    ours, theirs = values(first), values(second)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        ulp = 1e-6 if path.endswith("inv_freq") else 0  # computed: ours is rounded as torch's
        np.testing.assert_allclose(value, theirs[path], rtol=ulp, atol=0, err_msg=path)


def task_of(model: Any) -> Any:
    """Returns the task of a KerasHub backbone that writes text, without a preprocessor."""
    name = type(model).__name__.replace("Backbone", "CausalLM")
    return getattr(keras_hub.models, name)(backbone=model, preprocessor=None)
