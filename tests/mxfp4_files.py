"""Directories whose experts are MXFP4, as those of gpt-oss are published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def pack_experts(folder: Path) -> None:
    """Puts random MXFP4 tensors in the place of the matrices of a directory's experts."""
    path, random = folder / "model.safetensors", np.random.default_rng(3)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inner, outer = tensors.pop(name).shape
        shape = (experts, outer, inner // 32)
        tensors[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), "uint8")
        tensors[f"{name}_scales"] = random.integers(121, 126, shape, "uint8")  # 2^-6 to 2^-2
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(config))


def load_packed(folder: Path) -> Any:
    """Returns Transformers' model of such a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).eval()
