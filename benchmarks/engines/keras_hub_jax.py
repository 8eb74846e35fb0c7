"""KerasHub on JAX: `CausalLM.generate`, one program from prompt to last token."""

import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras_hub
import numpy as np

from benchmarks.engines.base import Engine


class KerasHub(Engine):
    """`generate` on ids, padded to the full length, as its preprocessor would hand them over."""

    def __init__(self, weights: Path, precision: str) -> None:
        # Its users have to ask JAX for this themselves; it concerns the time to the first token.
        jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
        # Its converter leaves the epsilon at 1e-6, whatever the config says.
        epsilon = json.loads((weights / "config.json").read_text())["rms_norm_eps"]
        backbone = keras_hub.models.Llama3Backbone.from_preset(
            str(weights), dtype=precision, layer_norm_epsilon=epsilon
        )
        self._model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
        self._model.compile(sampler="greedy", jit_compile=True)

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        prompt_BT = np.array(prompts, "int32")
        length = prompt_BT.shape[1]
        inputs = {
            "token_ids": np.pad(prompt_BT, ((0, 0), (0, num_new))),
            "padding_mask": np.pad(np.ones_like(prompt_BT), ((0, 0), (0, num_new))),
        }
        output = self._model.generate(inputs, stop_token_ids=None)
        return np.asarray(output["token_ids"])[:, length:].tolist()
