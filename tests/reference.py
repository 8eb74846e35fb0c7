"""Transformers as the reference: tiny random models that exercise every part."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import rwkv7_model  # noqa: F401  makes it known to Transformers


def make_reference(config: dict[str, Any], seed: int = 0) -> Any:
    """Returns a random Transformers model, eager attention, float32.

    The default initialisation hardly moves attention: noise on every parameter makes a wrong
    rotation, window or norm change the logits by more than 1e-3.
    """
    torch.manual_seed(seed)
    # A copy: some families of Transformers write into the dict of RoPE's parameters.
    config = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_of(config), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vector = parameter.ndim == 1
            strong = "q_proj" in name or "k_proj" in name
            scale = 0.1 if vector else 0.3 if strong else 0.12
            parameter.add_(torch.randn_like(parameter) * scale)
        for name, buffer in model.named_buffers():
            # Corrections of experts' scores: large enough to change the choice.
            if "correction" in name or "expert_bias" in name:
                buffer.add_(torch.randn_like(buffer) * 0.3)
            if "layer_scalar" in name:
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.eval()


def attention_of(config: Any) -> str:
    """Returns which of Transformers' implementations of attention is right.

    Falcon's "eager" counts ALiBi twice: in the scores, and in the mask that is added to them.
    """
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def save_reference(config: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    """Returns such a model, saved in Hugging Face layout."""
    model = make_reference(config, seed)
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, token_ids: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Returns the logits (B, T, V) of a Transformers model."""
    with torch.no_grad():
        return model(torch.tensor(token_ids), **kwargs).logits.float().numpy()


def reference_greedy(model: Any, ids: list[int], count: int, use_cache: bool = False) -> list[int]:
    """Returns `count` greedy ids after `ids`, stopping at nothing.

    By default without a cache: Transformers' ring for a window of one keeps everything.
    """
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        eos_token_id=-1,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()
