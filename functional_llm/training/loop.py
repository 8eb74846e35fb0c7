"""The training run: calls of Keras's `fit`, evaluations between them, and resuming after a kill."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import keras

from functional_llm.graph.types import JSON
from functional_llm.training.callbacks import Checkpoints, History, Logs, Progress, TensorBoard
from functional_llm.training.checked_data import check_batch
from functional_llm.training.checkpoints import (
    check_arguments,
    load_checkpoint,
    read_facts,
    read_stream_state,
)
from functional_llm.training.loss import LossModel
from functional_llm.training.memory import advise, predict_memory
from functional_llm.training.optimizer import make_optimizer, make_schedule
from functional_llm.training.packing import Batches, Rows
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
    if not backbone.trainable_variables:
        raise ValueError(
            "Expected trainable weights, received a model whose weights are all frozen. Freeze "
            "fewer of them, or add an adapter with `functional_llm.peft`."
        )
    path = Path(folder) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known at once
    check_resume(folder, rows, held_out, settings, resume=resume, arguments=arguments)
    arguments = _all_arguments(settings, rows, held_out, arguments)
    for data in (rows, held_out):  # of a stream, each batch is checked
        if isinstance(data, Rows):
            check_batch(data.token_ids, data.labels, backbone.output["logits"].shape[-1])
    model = compile_model(backbone, settings)
    history = _start_or_resume(path, model, settings)
    if resume and not path.exists():
        say(f"There is no checkpoint in {path.parent}: this run begins at step 0.")
    done = history.step * settings.accumulate
    batches = _make_batches(rows, settings, path, done)
    streamed = batches if isinstance(batches, StreamedBatches) else None
    memory = predict_memory(model, batches[done])  # kept to the end, for its program
    if memory is not None:
        say(memory.describe())
        if check_memory:
            name = remat_name(settings.remat)
            memory.check(advise(settings.batch_size, name, model.product_dtype))
    validation = None if held_out is None else Batches(held_out, settings.batch_size)
    progress = Progress(settings.steps, batches, history)
    every = settings.checkpoint_every or settings.steps
    saver = Checkpoints(path, every, history, arguments, streamed)
    all_callbacks = [history, progress, *([saver] if settings.checkpoint_every else [])]
    boards = [TensorBoard(Path(folder) / "tensorboard", history)] if tensorboard else []
    finish = _Finish(settings.steps, history, save)
    all_callbacks += [finish, *boards, *callbacks]
    try:
        if validation is not None and settings.evaluates_at(history):
            history.add_held_out(
                model.evaluate(validation, verbose=0, return_dict=True)["token_loss"]
            )
            say(_status_line(history, progress))
        for start, stop in settings.rounds(history.step):
            part = batches.between(start * settings.accumulate, stop * settings.accumulate)
            model.fit(
                part, validation_data=validation, shuffle=False, verbose=0, callbacks=all_callbacks
            )
            say(_status_line(history, progress))
        if settings.checkpoint_every:
            saver.save(model)
        finish.run()
        if streamed is not None:
            say(streamed.describe(history.step * settings.accumulate))
    except Exception as error:
        if not finish.is_done:
            if path.exists():
                error.add_note(f"{path} has step {read_facts(path)['step']}: resume from there.")
            raise
        say(f"What was trained is saved; the last evaluation failed: {_first_line(error)}")
    finally:
        progress.close()
        for board in boards:
            board.close()
    return history


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

    Args:
        folder: As for `train`; the others too.
        rows: Training data.
        held_out: Data to evaluate on, or `None`.
        settings: The hyperparameters.
        resume: Whether to go on from a checkpoint.
        arguments: What else must be the same.

    Raises:
        ValueError: If there is a checkpoint and `resume` is `False`, or it is damaged or of a run
            with other arguments.
    """
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        return
    if not resume:
        raise ValueError(
            f"{path} is the checkpoint of an earlier run. Ask to resume it, choose another output, "
            "or delete it to begin anew."
        )
    given = _all_arguments(settings, rows, held_out, arguments)
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
