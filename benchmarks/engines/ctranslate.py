"""CTranslate2: `Generator.generate_batch`, on all cores."""

import os
from pathlib import Path

import ctranslate2

from benchmarks.conversions import converted
from benchmarks.engines.base import Engine


class CTranslate2(Engine):
    """One batch at a time, on all threads. A token's name is its id (see `conversions.py`)."""

    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None:
        self._generator = ctranslate2.Generator(
            str(converted(weights, "ctranslate2", precision)),
            compute_type=precision,
            intra_threads=len(os.sched_getaffinity(0)),
        )

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        results = self._generator.generate_batch(
            [[str(token) for token in row] for row in prompts],
            max_length=num_new,
            end_token=[],  # stops at nothing
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]
