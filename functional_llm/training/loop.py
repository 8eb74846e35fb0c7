"""The training run: calls of Keras's `fit`, evaluations between them, and resuming after a kill."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import keras

from functional_llm.graph.types import JSON
from functional_llm.training.callbacks import Checkpoints, History, Progress, TensorBoard
from functional_llm.training.checkpoints import check_arguments, load_checkpoint, read_facts
from functional_llm.training.loss import LossModel
from functional_llm.training.optimizer import make_optimizer, make_schedule
from functional_llm.training.packing import Batches, Rows

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
        seed: Seed of the order of the data.
        chunk_size: Tokens whose logits exist at a time.
        remat: Compute decoder layers again in the backward pass: less memory, more time.
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
    chunk_size: int = 512
    remat: bool = False
    checkpoint_every: int = 50
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        smallest = {"steps": 1, "batch_size": 1, "accumulate": 1, "chunk_size": 1}
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and value < smallest.get(name, 0):
                raise ValueError(
                    f"Expected `{name}` of at least {smallest.get(name, 0)}, received {value}."
                )

    def rounds(self, done: int) -> list[tuple[int, int]]:
        """Returns `(start, stop)` for each call of `fit` that remains after `done` steps."""
        every = self.evaluate_every or self.steps
        ends = [*range((done // every + 1) * every, self.steps, every), self.steps]
        return [(a, b) for a, b in zip([done, *ends[:-1]], ends, strict=True) if a < b]


def train(
    backbone: keras.Model,
    rows: Rows,
    held_out: Rows | None,
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    arguments: JSON | None = None,
    tensorboard: bool = False,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    say: Callable[[str], None] = print,
) -> History:
    """Trains the trainable weights of a backbone.

    A run that is killed at any moment and resumed ends with the same weights, bit for bit, as one
    that is not: on the same machine and with the same versions of its libraries.

    Args:
        backbone: The model, changed in place.
        rows: Training data, from `pack`.
        held_out: Data to evaluate on, or `None`.
        settings: The hyperparameters.
        folder: The folder of the checkpoint and of TensorBoard's logs.
        resume: Go on from the checkpoint in `folder`, or from the beginning if there is none.
        arguments: What else must be the same in a resumed run, as plain data.
        tensorboard: Write logs for TensorBoard.
        callbacks: More callbacks, which come after those of the run.
        say: Receives a line about each evaluation.

    Returns:
        The losses, including those before a resume.

    Raises:
        ValueError: If no weight is trainable, `folder` has a checkpoint and `resume` is `False`, or
            the checkpoint is damaged or of a run with other arguments.
        OSError: If the folder cannot be made, or a checkpoint cannot be written.
    """
    if not backbone.trainable_variables:
        raise ValueError(
            "Expected trainable weights, received a model whose weights are all frozen. Freeze "
            "fewer of them, or add an adapter with `functional_llm.peft`."
        )
    path = Path(folder) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known at once
    arguments = _all_arguments(settings, rows, held_out, arguments)
    model = compile_model(backbone, settings)
    history = _start_or_resume(path, model, settings, arguments, resume)
    batches = Batches(rows, settings.batch_size, settings.seed)
    validation = None if held_out is None else Batches(held_out, settings.batch_size)
    progress = Progress(settings.steps, batches, history)
    saver = Checkpoints(path, settings.checkpoint_every or settings.steps, history, arguments)
    all_callbacks = [history, progress, *([saver] if settings.checkpoint_every else [])]
    boards = [TensorBoard(Path(folder) / "tensorboard", history)] if tensorboard else []
    all_callbacks += [*boards, *callbacks]
    try:
        if validation is not None and not history.held_out:
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
    settings: Settings, rows: Rows, held_out: Rows | None, others: JSON | None
) -> JSON:
    numbers = asdict(settings)
    del numbers["checkpoint_every"]  # changes no weight
    data = {"data": rows.fingerprint()}
    if held_out is not None:
        data["held_out_data"] = held_out.fingerprint()
    return {**(others or {}), **numbers, **data}


def _start_or_resume(
    path: Path, model: keras.Model, settings: Settings, arguments: JSON, resume: bool
) -> History:
    if not path.exists():
        return History(settings.accumulate)
    if not resume:
        raise ValueError(
            f"{path} is the checkpoint of an earlier run. Ask to resume it, choose another output, "
            "or delete it to begin anew."
        )
    check_arguments(path, read_facts(path).get("arguments", {}), arguments)
    facts = load_checkpoint(path, model)
    return History(
        settings.accumulate,
        facts["step"],
        losses=facts["losses"],
        held_out=facts["held_out"],
    )


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
