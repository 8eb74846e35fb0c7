"""functional_llm: TextGenerator and training, as a user makes them."""

from pathlib import Path

import numpy as np

import functional_llm as flm
from benchmarks.engines.base import ALPHA, LEARNING_RATE, RANK, Engine, Trainer


class FunctionalLLM(Engine):
    """This library."""

    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None:
        dtype = "bfloat16" if precision == "int8" else precision
        backbone = flm.Backbone.from_preset(weights, dtype=dtype, load_weights=load_weights)
        if precision == "int8":
            backbone = flm.quantize(backbone, "int8")
        self._generator = flm.TextGenerator(backbone)

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        return self._generator.generate_ids(prompts, max_new_tokens=num_new)


class FunctionalLLMTrainer(Trainer):
    """What `scripts/finetune.py` makes."""

    def __init__(
        self,
        weights: Path,
        precision: str,
        lora: bool,
        load_weights: bool = True,
        targets: str = "all",
        remat: bool = False,
    ) -> None:
        flm.training.keep_memory()
        dtype = "mixed_bfloat16" if precision == "bfloat16" and not lora else precision
        model = flm.Backbone.from_preset(weights, dtype=dtype, load_weights=load_weights)
        if lora:
            chosen = ["query", "value"] if targets == "qv" else "all"
            model = flm.peft.lora(model, rank=RANK, alpha=ALPHA, targets=chosen, seed=0)
        settings = flm.training.Settings(
            steps=1000,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            clip_norm=0,
            remat="layer" if remat else "nothing",
        )
        self._model = flm.training.compile_model(model, settings)

    def step(self, rows: list[list[int]]) -> float:
        ids = np.array(rows, "int32")
        logs = self._model.train_on_batch(ids[:, :-1], ids[:, 1:], return_dict=True)
        return float(logs["batch_loss"])
