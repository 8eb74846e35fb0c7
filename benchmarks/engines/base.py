"""What the harness asks of an engine."""

import abc
from pathlib import Path

RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-3


class Engine(abc.ABC):
    """One library with one loaded model, alone in a process.

    The constructor loads `weights`, a directory in Hugging Face layout, in `precision`, with the
    settings that the library itself recommends for speed. Without `load_weights` they are random,
    and `weights` has a `config.json` only.
    """

    @abc.abstractmethod
    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None: ...

    @abc.abstractmethod
    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Returns `num_new` greedy ids for each prompt; all prompts are of one length.

        Exactly so many, whatever the model would stop at: all engines do the same work. The ids
        must be on the host when it returns.
        """


class Trainer(abc.ABC):
    """One library with one model that learns, alone in a process.

    The constructor loads `weights` for AdamW, without decay and clipping: with `lora`, adapters of
    `RANK` on all seven projections of each layer, in a model whose weights are of `precision`;
    without, all weights, which stay in float32 where `precision` is bfloat16, and only the sums
    are narrower: steps of this size are lost in bfloat16 weights. With the targets `"qv"`, only
    queries and values have adapters. With `remat`, layers are computed again in the backward pass.
    """

    @abc.abstractmethod
    def __init__(
        self,
        weights: Path,
        precision: str,
        lora: bool,
        load_weights: bool = True,
        targets: str = "all",
        remat: bool = False,
    ) -> None: ...

    @abc.abstractmethod
    def step(self, rows: list[list[int]]) -> float:
        """Updates the weights; returns the mean loss before it.

        Args:
            rows: (B, T + 1) ids. Each of the last T is the label of the one before it.
        """
