"""Transformers on torch, on a GPU or all cores: `generate` with its cache; training with PEFT."""

import os
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.engines.base import ALPHA, LEARNING_RATE, RANK, Engine, Trainer

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Transformers(Engine):
    """Transformers' own attention choice (SDPA), eager mode: what its users run."""

    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None:
        self._model = _load(weights, precision, load_weights).eval()

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        ids_BT = torch.tensor(prompts, device=_DEVICE)
        with torch.inference_mode():
            output = self._model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=num_new,
                min_new_tokens=None,
                do_sample=False,
                use_cache=True,
                eos_token_id=-1,  # stops at nothing
                pad_token_id=0,
            )
        return output[:, ids_BT.shape[1] :].tolist()


class TransformersTrainer(Trainer):
    """As Transformers' Trainer: PEFT's adapters, fused AdamW, autocast in bfloat16."""

    def __init__(
        self,
        weights: Path,
        precision: str,
        lora: bool,
        load_weights: bool = True,
        targets: str = "all",
        remat: bool = False,
    ) -> None:
        model = _load(weights, precision if lora else "float32", load_weights).train()
        if lora:
            chosen = ["q_proj", "v_proj"] if targets == "qv" else _PROJECTIONS
            config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=chosen)
            model = peft.get_peft_model(model, config)
        if remat:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()  # without it, frozen embeddings stop the gradient
        self._model = model
        self._autocast = precision == "bfloat16"
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, rows: list[list[int]]) -> float:
        ids = torch.tensor(rows, device=_DEVICE)
        labels_BT = ids[:, 1:].contiguous()
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=self._autocast):
            output = self._model(
                input_ids=ids[:, :-1], labels=labels_BT, shift_labels=labels_BT, use_cache=False
            )
        output.loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return output.loss.item()


def _load(weights: Path, precision: str, load_weights: bool = True) -> Any:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in its users' scripts
    dtype = getattr(torch, precision)
    make = transformers.AutoModelForCausalLM
    if load_weights:
        return make.from_pretrained(weights, dtype=dtype).to(_DEVICE)
    config = transformers.AutoConfig.from_pretrained(weights)
    with torch.device(_DEVICE):
        return make.from_config(config, dtype=dtype)
