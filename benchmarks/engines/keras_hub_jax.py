"""KerasHub on JAX: `CausalLM.generate`, one program from prompt to last token; and its training."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras
import keras_hub
import numpy as np

from benchmarks.engines.base import LEARNING_RATE, RANK, Engine, Trainer

# By default its `enable_lora` covers queries and values.
_PROJECTIONS = (
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_gate_dense",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
)


class KerasHub(Engine):
    """`generate` on ids, padded to the full length, as its preprocessor would hand them over."""

    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None:
        self._model = _load(weights, precision, load_weights)
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


class KerasHubTrainer(Trainer):
    """`train_on_batch` of the CausalLM. Its LoRA's alpha is the rank: the work is the same."""

    def __init__(
        self,
        weights: Path,
        precision: str,
        lora: bool,
        load_weights: bool = True,
        targets: str = "all",
        remat: bool = False,
    ) -> None:
        if remat:
            raise ValueError("KerasHub has no option to compute layers again.")
        dtype = "mixed_bfloat16" if precision == "bfloat16" and not lora else precision
        self._model = _load(weights, dtype, load_weights)
        if lora:
            chosen = ("query", "value") if targets == "qv" else _PROJECTIONS
            self._model.backbone.enable_lora(RANK, target_layer_names=chosen)
        self._model.compile(
            optimizer=keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.0, epsilon=1e-8),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
        )

    def step(self, rows: list[list[int]]) -> float:
        ids = np.array(rows, "int32")
        inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
        self._model.reset_metrics()  # else it returns the mean over all steps
        logs = self._model.train_on_batch(inputs, ids[:, 1:], return_dict=True)
        return float(logs["loss"])


def _load(weights: Path, dtype: str, load_weights: bool = True) -> Any:
    # Its users have to ask JAX for this themselves; it concerns the time to the first token.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    # Its converter leaves the epsilon at 1e-6, whatever the config says.
    epsilon = json.loads((weights / "config.json").read_text())["rms_norm_eps"]
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(weights), load_weights=load_weights, dtype=dtype, layer_norm_epsilon=epsilon
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
