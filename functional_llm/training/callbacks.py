"""Keras callbacks: history, progress, checkpoints, TensorBoard."""

import math
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias

import keras

from functional_llm.files.processes import is_first
from functional_llm.graph.types import JSON
from functional_llm.training.checkpoints import save_checkpoint
from functional_llm.training.display import Display, make_display
from functional_llm.training.packing import Batches
from functional_llm.training.processes import begin_step
from functional_llm.training.streaming import StreamedBatches

Logs: TypeAlias = dict[str, float] | None  # what Keras gives to callbacks


class History(keras.callbacks.Callback):
    """Counts steps and collects the losses of a `LossModel`, over several calls of `fit`.

    Args:
        accumulate: Batches of one step.
        step: Steps done before.
        losses: Training loss of each step before.
        held_out: `[step, held-out loss]` of each evaluation before.

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
        self._parts: list[tuple[float, float]] = []  # loss and weight of the step's batches

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        begin_step(self.step * self.accumulate + len(self._parts) + 1)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        logs = logs or {}
        self._parts.append((float(logs["batch_loss"]), float(logs["batch_weight"])))
        if len(self._parts) == self.accumulate:
            self.step += 1
            weight = sum(weight for _, weight in self._parts)
            self.losses.append(sum(x * y for x, y in self._parts) / max(weight, 1e-9))
            self._parts = []
            if not math.isfinite(self.losses[-1]):
                raise RuntimeError(
                    f"The loss is {self.losses[-1]} at step {self.step}. Expected a finite number: "
                    "lower the learning rate, clip the gradient, or use another dtype."
                )

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if "val_token_loss" in (logs or {}):
            self.add_held_out(float((logs or {})["val_token_loss"]))

    def add_held_out(self, loss: float) -> None:
        """Adds a held-out loss at the current step."""
        self.held_out.append([self.step, loss])

    def facts(self) -> JSON:
        """Returns the constructor's arguments that restore it, as plain data."""
        return {"step": self.step, "losses": self.losses, "held_out": self.held_out}


class Checkpoints(keras.callbacks.Callback):
    """Saves the state of training at regular steps.

    Args:
        path: The file, replaced each time.
        every: Steps from one checkpoint to the next.
        history: The run's `History`, which must come before this callback.
        arguments: The arguments of the run, as plain data.
        batches: The training data, if they are a stream, whose place is saved.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        history: History,
        arguments: JSON,
        batches: StreamedBatches | None = None,
    ) -> None:
        super().__init__()
        self.path, self.every, self.history, self.arguments = path, every, history, arguments
        self.batches = batches
        self._saved = history.step

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.history.step
        if step != self._saved and step % self.every == 0:
            self.save(self.model)  # Keras's property writes the step's values into the variables

    def on_test_begin(self, logs: Logs = None) -> None:
        if self.history.step != self._saved:  # before an evaluation, which may fail
            self.save(self.model)

    def save(self, model: keras.Model) -> None:
        """Saves now."""
        self._saved, history = self.history.step, self.history
        place = None
        if self.batches is not None:
            place = self.batches.state(history.step * history.accumulate)
        facts = {**history.facts(), "arguments": self.arguments}
        save_checkpoint(self.path, model, facts, place)


class Progress(keras.callbacks.Callback):
    """Shows steps, loss, tokens per second and time left.

    It is a bar on a terminal and in a notebook. Elsewhere, in a log, it is a line every half a
    minute.

    Args:
        steps: Steps of the whole run.
        batches: The training data.
        history: The run's `History`, which must come before this callback.
    """

    def __init__(self, steps: int, batches: Batches | StreamedBatches, history: History) -> None:
        super().__init__()
        self.steps, self.batches, self.history = steps, batches, history
        self.tokens, self.seconds = 0, 0.0
        self._display: Display | None = None
        self._shown = history.step
        self._began = 0.0
        self._number = history.step * history.accumulate
        self._first = True

    def on_train_begin(self, logs: Logs = None) -> None:
        if self._display is None and is_first():  # a run calls `fit` several times
            self._display = make_display(self.steps, self.history.step)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if not self._first:  # the first batch compiles
            self.seconds += time.perf_counter() - self._began
            self.tokens += self.batches.count_tokens(self._number)
        self._first = False
        self._number += 1
        if self.history.step > self._shown and self._display is not None:
            self._shown = self.history.step
            facts = {"loss": f"{self.history.losses[-1]:.4f}"}
            if isinstance(self.batches, StreamedBatches):  # nobody knows of how many
                facts["tokens"] = f"{self.batches.tokens_before(self._number):,}"
            if self.seconds:
                facts["tokens/s"] = f"{self.tokens_per_second:.0f}"
            self._display.show(self._shown, facts)

    @property
    def tokens_per_second(self) -> float:
        """Training speed, without padding and without the first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """Ends what is shown."""
        if self._display is not None:
            self._display.close()
            self._display = None


class TensorBoard(keras.callbacks.Callback):
    """Writes losses for TensorBoard, with the library tensorboardX.

    Keras's callback of this name needs TensorFlow.

    Args:
        folder: The folder of the event files.
        history: The run's `History`, which must come before this callback.

    Raises:
        ImportError: If tensorboardX is missing.
    """

    def __init__(self, folder: Path, history: History) -> None:
        super().__init__()
        self.history, self._written = history, history.step
        # TensorBoard forgets what a killed run wrote after its last checkpoint.
        self.writer: Any = import_writer()(str(folder), purge_step=history.step + 1)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.history.step
        if step > self._written:
            self._written = step
            self._write({"loss/train": self.history.losses[-1]}, step)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        for step, loss in self.history.held_out[-1:]:
            scalars = {"loss/held_out": loss, "perplexity/held_out": math.exp(loss)}
            self._write(scalars, int(step))

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self.writer is None:
            return
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            # The library writes in a thread; if the disk is full, it would wait for it for ever.
            self.writer.flush()
        except OSError as error:
            self.writer = None
            print(f"No more logs for TensorBoard: {error}", file=sys.stderr)

    def close(self) -> None:
        """Waits until everything is written: the library writes in a thread."""
        if self.writer is not None:
            self.writer.close()


def import_writer() -> Any:
    """Returns the class that writes TensorBoard's files.

    Raises:
        ImportError: If tensorboardX is missing.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard logs need tensorboardX, which is not installed. Install it: "
            "pip install tensorboardX."
        ) from None
    return SummaryWriter
