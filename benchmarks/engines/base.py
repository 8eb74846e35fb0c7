"""What the harness asks of an engine."""

import abc
from pathlib import Path


class Engine(abc.ABC):
    """One library with one loaded model, alone in a process.

    The constructor loads `weights`, a directory in Hugging Face layout, in `precision`, with the
    settings that the library itself recommends for speed.
    """

    @abc.abstractmethod
    def __init__(self, weights: Path, precision: str) -> None: ...

    @abc.abstractmethod
    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Returns `num_new` greedy ids for each prompt; all prompts are of one length.

        Exactly so many, whatever the model would stop at: all engines do the same work. The ids
        must be on the host when it returns.
        """
