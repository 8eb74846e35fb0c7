"""Transformers on torch: `generate` with its cache, on all cores, without gradients."""

import os
from pathlib import Path

import torch
import transformers

from benchmarks.engines.base import Engine


class Transformers(Engine):
    """Transformers' own attention choice (SDPA), eager mode: what its users run on a CPU."""

    def __init__(self, weights: Path, precision: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            weights, dtype=getattr(torch, precision)
        ).eval()

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        ids_BT = torch.tensor(prompts)
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
