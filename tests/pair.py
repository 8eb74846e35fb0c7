"""A tiny random Transformers model and ours with its weights: what the property tests share.

`run` compiles a program for each structure and shape of its inputs, and for each config, in 0.3 s:
every test pads what it has to (ROWS, LENGTH), or adds one token a row.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import CONFIGS
from functional_llm.presets.backbone import Backbone
from reference import reference_logits, save_reference

ROWS, LENGTH, SLOTS = 3, 72, 80  # longer than any window, and than YaRN's original length
SHAPES = ((ROWS, LENGTH), (ROWS, 1))


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns token ids that every tiny model knows, int32."""
    return np.random.default_rng(seed).integers(0, 128, shape).astype("int32")


TOKENS = random_tokens(ROWS, LENGTH)


def compiled(model: Any) -> Callable[[Any], Any]:
    """Returns a model's call as one program a shape: eager calls compile every operation."""
    program = jax.jit(lambda values, inputs: model.stateless_call(*values, inputs)[0])

    def run(inputs: Any) -> Any:
        variables = (model.trainable_variables, model.non_trainable_variables)
        values = jax.tree.map(lambda variable: variable.value, variables)
        return jax.tree.map(np.asarray, program(values, inputs))

    return run


class Pair:
    """A Transformers model, its checkpoint, and our model loaded from it; no test changes them.

    Args:
        name: Of the config.
        folder: Where to save the checkpoint.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.reference = save_reference(CONFIGS[name], folder)
        self.ours = Backbone.from_preset(folder)
        self._program = compiled(self.ours)

    def run(self, inputs: Any) -> Any:
        """Returns what our model makes of token ids, or of a dict with `token_ids`."""
        shape = (inputs["token_ids"] if isinstance(inputs, dict) else inputs).shape
        assert shape in SHAPES, f"a program for {shape} more, for every config"
        return self._program(inputs)

    @cached_property
    def logits(self) -> np.ndarray:
        """Our logits of TOKENS."""
        return self.run(TOKENS)

    @cached_property
    def expected(self) -> np.ndarray:
        """The reference's logits of TOKENS."""
        return reference_logits(self.reference, TOKENS)
