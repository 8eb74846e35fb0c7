"""The training run: calls of Keras's `fit`, evaluations between them, and resuming after a kill."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import keras

from functional_llm.files.processes import is_first
from functional_llm.graph.types import JSON
from functional_llm.training.callbacks import Checkpoints, History, Logs, Progress, TensorBoard
from functional_llm.training.checked_data import check_batch
from functional_llm.training.checkpoints import (
    check_arguments,
    load_checkpoint,
    read_facts,
    read_stream_state,
)
from functional_llm.training.loss import LossModel, check_trainable
from functional_llm.training.memory import advise, predict_memory
from functional_llm.training.optimizer import make_optimizer, make_schedule
from functional_llm.training.packing import Batches, Rows
from functional_llm.training.processes import agree
from functional_llm.training.rematerialize import remat_name
from functional_llm.training.streaming import StreamedBatches, StreamedRows

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyperparameters of a training run.

    Args:
        steps: Updates of the weights.
        batch_size: Rows of a batch.
        accumulate: Batches whose mean gradient makes one step.
        learning_rate: The highest learning rate.
        schedule: `"cosine"`, `"linear"` or `"constant"`.
        warmup_steps: Steps in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        seed: Seed of the order of rows in memory; a stream has its own.
        chunk_size: Tokens whose logits exist at a time; `None` to choose for the device.
        remat: What is computed again in the backward pass, for less memory: `"nothing"`,
            `"products"` or `"layer"`, as for `LossModel`.
        checkpoint_every: Steps from one checkpoint to the next; 0 for none.
        evaluate_every: Steps from one evaluation to the next; 0 for one at the end.
    """

    steps: int
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    chunk_size: int | None = None
    remat: bool | str = "nothing"
    checkpoint_every: int = 50
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        smallest = {"steps": 1, "batch_size": 1, "accumulate": 1, "chunk_size": 1}
        for name, value in asdict(self).items():
            least = smallest.get(name, 0)
            if isinstance(value, (int, float)) and not (value >= least and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` of at least {least}, received {value}.")
        make_schedule(self.schedule, self.learning_rate, self.steps, self.warmup_steps)
        remat_name(self.remat)

    def evaluates_at(self, history: History) -> bool:
        """Whether an evaluation is due now that is not in the history."""
        step, every = history.step, self.evaluate_every or self.steps
        is_due = step % every == 0 or step == self.steps
        return is_due and step not in [at for at, _ in history.held_out]

    def rounds(self, done: int) -> list[tuple[int, int]]:
        """Returns `(start, stop)` for each call of `fit` that remains after `done` steps."""
        every = self.evaluate_every or self.steps
        ends = [*range((done // every + 1) * every, self.steps, every), self.steps]
        return [(a, b) for a, b in zip([done, *ends[:-1]], ends, strict=True) if a < b]


def train(
    backbone: keras.Model,
    rows: Rows | StreamedRows,
    held_out: Rows | None,
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    arguments: JSON | None = None,
    tensorboard: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    save: Callable[[], object] | None = None,
    say: Callable[[str], None] = print,
    check_memory: bool = True,
) -> History:
    """Trains the trainable weights of a backbone.

    A run that is killed at any moment and resumed ends with the same weights, bit for bit, as one
    that is not: on the same machine and with the same versions of its libraries.

    Several processes train together if each calls this with the same arguments, after
    `flm.sharding.join_processes`. All of them read the folder; the first one writes.

    Args:
        backbone: The model, changed in place.
        rows: Training data, from `pack`; or a stream of them, which begins again where it ends.
            The checkpoint has the stream's place, and the examples that are read and not used yet.
        held_out: Data to evaluate on, or `None`.
        settings: The hyperparameters.
        folder: The folder of the checkpoint and of TensorBoard's logs.
        resume: Go on from the checkpoint in `folder`, or from the beginning if there is none,
            which is said.
        arguments: What else must be the same in a resumed run, as plain data.
        tensorboard: Write logs for TensorBoard.
        callbacks: More callbacks, which come after those of the run.
        save: Saves the result. Called after the last step and before the last evaluation: if that
            fails, a line says so, and nothing is lost.
        say: Receives a line about the memory of a step, and one about each evaluation.
        check_memory: Whether a step that will not fit into the device's memory is an error before
            it is tried.

    Returns:
        The losses, including those before a resume.

    Raises:
        ValueError: If no weight is trainable, an id is not in the vocabulary, `folder` has a
            checkpoint and `resume` is `False`, the checkpoint is damaged or of a run with other
            arguments, or a step does not fit.
        OSError: If the folder cannot be made, or a checkpoint cannot be written.
    """
    path = Path(folder) / CHECKPOINT
    if not is_first():
        say, tensorboard = _say_nothing, False
    check_trainable(backbone)
    path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known at once
    check_resume(folder, rows, held_out, settings, resume=resume, arguments=arguments)
    _check_rows(backbone, rows, held_out)
    if resume and not path.exists():
        say(f"There is no checkpoint in {path.parent}: this run begins at step 0.")
    facts = _all_arguments(settings, rows, held_out, arguments)
    run = _Run(compile_model(backbone, settings), rows, held_out, settings, path, facts, say)
    run.predict_memory(check_memory)
    boards = [TensorBoard(Path(folder) / "tensorboard", run.history)] if tensorboard else []
    return run.run(_Finish(settings.steps, run.history, save), boards, callbacks)


def _say_nothing(line: str) -> None:
    """Receives what the first of several processes says."""


class _Run:
    """A run that goes on from its checkpoint, if there is one.

    Args:
        model: The model with its loss, compiled.
        rows: As for `train`; the others too.
        held_out: Data to evaluate on, or `None`.
        settings: The hyperparameters.
        path: Of the checkpoint.
        facts: What must be the same in a resumed run.
        say: Receives a line about each evaluation.
    """

    def __init__(
        self,
        model: LossModel,
        rows: Rows | StreamedRows,
        held_out: Rows | None,
        settings: Settings,
        path: Path,
        facts: JSON,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._settings, self._path, self._say = model, settings, path, say
        self.history = _start_or_resume(path, model, settings)
        self._done = self.history.step * settings.accumulate
        self._batches = batches = _make_batches(rows, settings, path, self._done)
        self._streamed = batches if isinstance(batches, StreamedBatches) else None
        self._validation = None if held_out is None else Batches(held_out, settings.batch_size)
        self._progress = Progress(settings.steps, batches, self.history)
        every = settings.checkpoint_every or settings.steps
        self._saver = Checkpoints(path, every, self.history, facts, self._streamed)

    def predict_memory(self, check: bool) -> None:
        """Says what memory a step takes; a step that does not fit is an error, if asked for."""
        # Kept to the end, for its program.
        self._memory = memory = predict_memory(self._model, self._batches[self._done])
        if memory is None:
            return
        self._say(memory.describe())
        if check:
            name = remat_name(self._settings.remat)
            memory.check(advise(self._settings.batch_size, name, self._model.product_dtype))

    def run(
        self,
        finish: "_Finish",
        boards: Sequence[TensorBoard],
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> History:
        """Trains to the last step; returns the losses."""
        saver = [self._saver] if self._settings.checkpoint_every else []
        try:
            self._fit([self.history, self._progress, *saver, finish, *boards, *callbacks])
            if saver:
                self._saver.save(self._model)
            finish.run()
            if self._streamed is not None:
                self._say(self._streamed.describe(self.history.step * self._settings.accumulate))
        except Exception as error:
            if not finish.is_done:
                if self._path.exists():
                    step = read_facts(self._path)["step"]
                    error.add_note(f"{self._path} has step {step}: resume from there.")
                raise
            self._say(
                f"What was trained is saved; the last evaluation failed: {_first_line(error)}"
            )
        finally:
            self._progress.close()
            for board in boards:
                board.close()
        return self.history

    def _fit(self, callbacks: list[keras.callbacks.Callback]) -> None:
        model, validation, settings = self._model, self._validation, self._settings
        if validation is not None and settings.evaluates_at(self.history):
            losses = model.evaluate(validation, verbose=0, return_dict=True)
            self.history.add_held_out(losses["token_loss"])
            self._say(_status_line(self.history, self._progress))
        for start, stop in settings.rounds(self.history.step):
            part = self._batches.between(start * settings.accumulate, stop * settings.accumulate)
            model.fit(
                part, validation_data=validation, shuffle=False, verbose=0, callbacks=callbacks
            )
            self._say(_status_line(self.history, self._progress))


def _check_rows(backbone: keras.Model, rows: Rows | StreamedRows, held_out: Rows | None) -> None:
    for data in (rows, held_out):  # of a stream, each batch is checked
        if isinstance(data, Rows):
            check_batch(data.token_ids, data.labels, backbone.output["logits"].shape[-1])


def compile_model(backbone: keras.Model, settings: Settings) -> LossModel:
    """Returns the backbone with its loss, compiled."""
    model = LossModel(backbone, settings.chunk_size, settings.remat)
    schedule = make_schedule(
        settings.schedule,
        settings.learning_rate,
        settings.steps,
        settings.warmup_steps,
        settings.accumulate,
    )
    model.compile(
        make_optimizer(
            schedule, settings.accumulate, settings.clip_norm or None, settings.weight_decay
        )
    )
    return model


def _all_arguments(
    settings: Settings, rows: Rows | StreamedRows, held_out: Rows | None, others: JSON | None
) -> JSON:
    numbers = asdict(settings)
    del numbers["checkpoint_every"]  # changes no weight
    numbers["remat"] = remat_name(settings.remat)
    data = {"data": rows.fingerprint()}
    if held_out is not None:
        data["held_out_data"] = held_out.fingerprint()
    return {**(others or {}), **numbers, **data}


def check_resume(
    folder: str | Path,
    rows: Rows | StreamedRows,
    held_out: Rows | None,
    settings: Settings,
    *,
    resume: bool = False,
    arguments: JSON | None = None,
) -> None:
    """Checks, before a model is loaded, that a run can begin or go on in a folder.

    Several processes compare their arguments, data and checkpoints here.

    Args:
        folder: As for `train`; the others too.
        rows: Training data.
        held_out: Data to evaluate on, or `None`.
        settings: The hyperparameters.
        resume: Whether to go on from a checkpoint.
        arguments: What else must be the same.

    Raises:
        ValueError: If there is a checkpoint and `resume` is `False`, or it is damaged or of a run
            with other arguments, or if processes do not agree.
    """
    path = Path(folder) / CHECKPOINT
    given = _all_arguments(settings, rows, held_out, arguments)
    step = read_facts(path).get("step") if path.exists() else None
    agree("arguments", {**given, "step of the checkpoint": step})
    if not path.exists():
        return
    if not resume:
        raise ValueError(
            f"{path} is the checkpoint of an earlier run. Ask to resume it, choose another output, "
            "or delete it to begin anew."
        )
    kept = {"remat": "nothing", **read_facts(path).get("arguments", {})}
    check_arguments(path, {**kept, "remat": remat_name(kept["remat"])}, given)  # 0.1: a boolean


def _start_or_resume(path: Path, model: keras.Model, settings: Settings) -> History:
    if not path.exists():
        return History(settings.accumulate)
    facts = load_checkpoint(path, model)
    return History(
        settings.accumulate,
        facts["step"],
        losses=facts["losses"],
        held_out=facts["held_out"],
    )


def _make_batches(
    rows: Rows | StreamedRows, settings: Settings, path: Path, done: int
) -> Batches | StreamedBatches:
    if isinstance(rows, Rows):
        return Batches(rows, settings.batch_size, settings.seed)
    place = read_stream_state(path) if path.exists() else None
    return StreamedBatches(rows, settings.batch_size, place, done)


class _Finish(keras.callbacks.Callback):
    """Saves the result as soon as the last step is done: an evaluation that follows may fail."""

    def __init__(self, steps: int, history: History, save: Callable[[], object] | None) -> None:
        super().__init__()
        self.steps, self.history, self.save, self.is_done = steps, history, save, False

    def on_test_begin(self, logs: Logs = None) -> None:
        if self.history.step == self.steps:
            self.run()

    def run(self) -> None:
        """Saves, once."""
        if self.save is not None and not self.is_done:
            _ = self.model  # Keras's property writes the step's values into the variables
            self.save()
            self.is_done = True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _status_line(history: History, progress: Progress) -> str:
    parts = [f"step {history.step}"]
    if history.losses:
        parts.append(f"loss {history.losses[-1]:.4f}")
    if history.held_out:
        loss = history.held_out[-1][1]
        parts.append(f"held-out loss {loss:.4f} (perplexity {keras.ops.exp(loss):.2f})")
    if progress.seconds:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    return ", ".join(parts)
