"""Learning-rate schedules with warm-up, and the optimizer they go into."""

from typing import TypeAlias

import keras
from keras import ops

from functional_llm.graph.types import JSON, Tensor

Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule

SCHEDULES = ("cosine", "linear", "constant")


@keras.saving.register_keras_serializable("functional_llm")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to the first rate of another schedule, then follows that schedule.

    Args:
        schedule: The schedule after the warm-up, from its step 0.
        warmup_steps: Steps of the warm-up. The rate of the first is above 0, so that it learns.
        accumulate: Batches of one step. Keras calls a schedule with the number of the batch.
    """

    def __init__(self, schedule: Schedule, warmup_steps: int, accumulate: int = 1) -> None:
        self.schedule, self.warmup_steps, self.accumulate = schedule, warmup_steps, accumulate

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(ops.cast(step, "int32") // self.accumulate, "float32")
        rising = self.schedule(0.0) * (step + 1.0) / float(self.warmup_steps + 1)
        after = self.schedule(ops.maximum(step - float(self.warmup_steps), 0.0))
        return ops.where(step < float(self.warmup_steps), rising, after)

    def get_config(self) -> JSON:
        schedule = keras.saving.serialize_keras_object(self.schedule)
        numbers = {"warmup_steps": self.warmup_steps, "accumulate": self.accumulate}
        return {"schedule": schedule, **numbers}

    @classmethod
    def from_config(cls, config: JSON) -> "WarmUp":
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})


def make_schedule(
    kind: str, learning_rate: float, steps: int, warmup_steps: int = 0, accumulate: int = 1
) -> WarmUp:
    """Returns a schedule with a warm-up; it falls to 0 at the end, unless it is constant.

    Args:
        kind: `"cosine"`, `"linear"` or `"constant"`.
        learning_rate: The highest rate, reached after the warm-up.
        steps: All steps, those of the warm-up included.
        warmup_steps: Steps in which the rate rises linearly.
        accumulate: Batches of one step.

    Raises:
        ValueError: If the kind is unknown, or no step is left after the warm-up.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"Expected a schedule of {', '.join(SCHEDULES)}, received {kind!r}.")
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"Expected fewer steps of warm-up than steps, received {warmup_steps} and {steps}."
        )
    schedules = keras.optimizers.schedules
    if kind == "cosine":
        schedule = schedules.CosineDecay(learning_rate, steps - warmup_steps)
    else:
        end = 0.0 if kind == "linear" else learning_rate
        schedule = schedules.PolynomialDecay(learning_rate, steps - warmup_steps, end)
    return WarmUp(schedule, warmup_steps, accumulate)


def make_optimizer(
    learning_rate: float | Schedule,
    accumulate: int = 1,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
) -> keras.optimizers.Optimizer:
    """Returns AdamW with the settings that are usual for language models.

    Args:
        learning_rate: A number, or a schedule over batches.
        accumulate: Batches whose mean gradient makes one step.
        clip_norm: Largest norm of the gradient of all variables together; `None` for no limit.
        weight_decay: AdamW's weight decay. Biases and norms have none.
    """
    optimizer = keras.optimizers.AdamW(
        learning_rate,
        weight_decay=weight_decay,
        epsilon=1e-8,
        global_clipnorm=clip_norm or None,
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer
