"""Experts that lie one by one in several files: how much memory loading them takes at its peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import functional_llm as flm
from configs import CONFIGS
from functional_llm.blocks.experts import Router

D, E, LAYERS, VOCABULARY = 256, 32, 4, 64
CONFIG = {
    **CONFIGS["qwen3_moe_some_dense"],
    "hidden_size": D,
    "moe_intermediate_size": D,
    "num_experts": E,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "mlp_only_layers": [],
}
# VmHWM is the peak since something was written to clear_refs. A tiny model comes first: it takes
# what any model takes.
SCRIPT = """
import sys
import functional_llm as flm

def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name)) * 1024 / 1e6

small, large = sys.argv[1:3]
for options in ({"quantize": "int8"}, {}):
    flm.Backbone.from_preset(small, **options)
    open("/proc/self/clear_refs", "w").write("5")
    before = megabytes("VmRSS")
    backbone = flm.Backbone.from_preset(large, **options)
    weights = sum(v.value.nbytes for v in backbone.variables) / 1e6
    print(weights, megabytes("VmHWM") - before)
    del backbone
"""


def _write(folder: Path, layers: int) -> Path:
    """Writes a checkpoint of a file for each layer, and a tensor for each matrix of an expert."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    ones, random = np.ones(D, "float32"), np.random.default_rng(0)
    table = random.normal(size=(VOCABULARY, D)).astype("float32")
    rest = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": ones}
    files = {"model-0.safetensors": rest}
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (32, D),
            "self_attn.k_proj": (16, D),
            "self_attn.v_proj": (16, D),
            "self_attn.o_proj": (D, 32),
            "mlp.gate": (E, D),
        }
        parts = [f"{e}.{part}_proj" for e in range(E) for part in ("gate", "up", "down")]
        shapes |= {f"mlp.experts.{part}": (D, D) for part in parts}
        norms = {"input_layernorm": D, "post_attention_layernorm": D}
        norms |= {"self_attn.q_norm": 16, "self_attn.k_norm": 16}
        arrays = {x: random.normal(size=s).astype("float32") for x, s in shapes.items()}
        arrays |= {name: np.ones(size, "float32") for name, size in norms.items()}
        name = f"model-{layer + 1}.safetensors"
        files[name] = {f"model.layers.{layer}.{x}.weight": a for x, a in arrays.items()}
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    places = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured on Linux")
def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """A second copy, of floats where integers stay, would show: 100 MB of weights, 25 in int8."""
    small, large = _write(tmp_path / "small", 1), _write(tmp_path / "large", LAYERS)
    command = [sys.executable, "-c", SCRIPT, str(small), str(large)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        weights, peak = map(float, line.split())
        assert peak < 1.3 * weights + 40, lines


def test_more_experts_chosen_than_there_are(tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3_moe_some_dense"], "num_experts_per_tok": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"from 1 to num_experts.* 7 and 6"):
        flm.Backbone.from_preset(tmp_path, load_weights=False)
    for chosen in (0, 7):
        with pytest.raises(ValueError, match=f"from 1 to 6 chosen experts.*: {chosen}"):
            Router(num_experts=6, num_chosen=chosen)
