"""Keras callbacks: history, progress bar, checkpoints, TensorBoard."""

import math
import time
from pathlib import Path
from typing import Any

import keras
from tqdm import tqdm

from functional_llm.training.checkpoints import save_checkpoint
from functional_llm.training.packing import Batches


class History(keras.callbacks.Callback):
    """Counts steps over several `fit`s and keeps the losses of a `LossModel`.

    Args:
        accumulate: Batches that make one step.
        step: Steps done before.
        losses: Their losses.
        held_out: `[step, held-out loss]` of the evaluations before.

    Attributes:
        step: Steps done.
        losses: Training loss of each step.
        held_out: `[step, held-out loss]` of each evaluation.
    """

    def __init__(
        self,
        accumulate: int = 1,
        step: int = 0,
        losses: list[float] | None = None,
        held_out: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.accumulate, self.step = accumulate, step
        self.losses, self.held_out = list(losses or []), list(held_out or [])
        self._parts: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._parts.append(float((logs or {})["batch_loss"]))
        if len(self._parts) == self.accumulate:
            self.step += 1
            self.losses.append(sum(self._parts) / self.accumulate)
            self._parts = []
            if not math.isfinite(self.losses[-1]):
                raise RuntimeError(
                    f"The loss is {self.losses[-1]} at step {self.step}. Expected a finite number: "
                    "lower the learning rate, clip the gradient, or use another dtype."
                )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if "val_token_loss" in (logs or {}):
            self.add_held_out(float((logs or {})["val_token_loss"]))

    def add_held_out(self, loss: float) -> None:
        """Notes a held-out loss at the present step."""
        self.held_out.append([self.step, loss])

    def facts(self) -> dict[str, Any]:
        """Returns the constructor's arguments that bring it back, as plain data."""
        return {"step": self.step, "losses": self.losses, "held_out": self.held_out}


class Checkpoints(keras.callbacks.Callback):
    """Saves the state of training every so many steps.

    Args:
        path: The file, replaced each time.
        every: Steps from one checkpoint to the next.
        history: Must come before this one in the list of callbacks.
        arguments: What the run was started with, as plain data.
    """

    def __init__(self, path: Path, every: int, history: History, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.every, self.history, self.arguments = path, every, history, arguments
        self._saved = history.step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        step = self.history.step
        if step != self._saved and step % self.every == 0:
            self.save(self.model)  # which brings the model's state up to date

    def save(self, model: keras.Model) -> None:
        """Saves now."""
        self._saved = self.history.step
        save_checkpoint(self.path, model, {**self.history.facts(), "arguments": self.arguments})


class Progress(keras.callbacks.Callback):
    """A bar with steps, time left, loss and tokens a second; on a terminal only.

    Args:
        steps: All steps.
        batches: The training data.
        history: Must come before this one in the list of callbacks.
    """

    def __init__(self, steps: int, batches: Batches, history: History) -> None:
        super().__init__()
        self.batches, self.history = batches, history
        self.bar = tqdm(
            total=steps, initial=history.step, desc="Training", unit="step", disable=None
        )
        self.tokens, self.seconds = 0, 0.0
        self._began = 0.0
        self._number = history.step * history.accumulate
        self._first = True

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._first:  # that one compiles
            self.seconds += time.perf_counter() - self._began
            self.tokens += self.batches.count_tokens(self._number)
        self._first = False
        self._number += 1
        if self.history.step > self.bar.n:
            speed = f"{self.tokens_per_second:.0f}"
            self.bar.set_postfix({"loss": f"{self.history.losses[-1]:.4f}", "tokens/s": speed})
            self.bar.update(self.history.step - self.bar.n)

    @property
    def tokens_per_second(self) -> float:
        """Training speed, without the first batch, without padding."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()


class TensorBoard(keras.callbacks.Callback):
    """Writes losses and learning rate for TensorBoard, with the small library tensorboardX.

    (Keras's own callback of this name needs TensorFlow.)

    Args:
        folder: Where the event files go.
        history: Must come before this one in the list of callbacks.

    Raises:
        ImportError: If tensorboardX is missing.
    """

    def __init__(self, folder: Path, history: History) -> None:
        super().__init__()
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard logs need tensorboardX, which is not installed. Install it: "
                "pip install 'functional-llm[plots]'."
            ) from None
        self.history, self._written = history, history.step
        # What a killed run wrote after its last checkpoint is not shown twice.
        self.writer = SummaryWriter(str(folder), purge_step=history.step + 1)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        step = self.history.step
        if step > self._written:
            self._written = step
            self.writer.add_scalar("loss/train", self.history.losses[-1], step)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        for step, loss in self.history.held_out[-1:]:
            self.writer.add_scalar("loss/held_out", loss, step)
            self.writer.add_scalar("perplexity/held_out", math.exp(loss), step)
        self.writer.flush()

    def close(self) -> None:
        """Waits until all is on the disk: the library writes in a thread, and `flush` does not."""
        self.writer.close()
