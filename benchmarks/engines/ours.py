"""functional_llm: TextGenerator, as a user makes it."""

from pathlib import Path

import functional_llm as flm
from benchmarks.engines.base import Engine


class FunctionalLLM(Engine):
    """This library."""

    def __init__(self, weights: Path, precision: str) -> None:
        backbone = flm.Backbone.from_preset(weights, dtype=precision)
        self._generator = flm.TextGenerator(backbone)

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        return self._generator.generate_ids(prompts, max_new_tokens=num_new)
