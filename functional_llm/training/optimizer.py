"""Learning-rate schedules with warm-up, and the optimizer they go into."""

from typing import Any

import keras
from keras import ops

SCHEDULES = ("cosine", "linear", "constant")


@keras.saving.register_keras_serializable("functional_llm")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a straight line to where another schedule begins, then follows it.

    Args:
        schedule: The schedule after the warm-up, from its step 0.
        warmup_steps: Steps before it. The first is no zero, which would be a step for nothing.
        accumulate: Batches that make one step: it is those that Keras counts here.
    """

    def __init__(self, schedule: Any, warmup_steps: int, accumulate: int = 1) -> None:
        self.schedule, self.warmup_steps, self.accumulate = schedule, warmup_steps, accumulate

    def __call__(self, step: Any) -> Any:
        step = ops.cast(ops.cast(step, "int32") // self.accumulate, "float32")
        rising = self.schedule(0.0) * (step + 1.0) / float(self.warmup_steps + 1)
        after = self.schedule(ops.maximum(step - float(self.warmup_steps), 0.0))
        return ops.where(step < float(self.warmup_steps), rising, after)

    def get_config(self) -> dict[str, Any]:
        schedule = keras.saving.serialize_keras_object(self.schedule)
        numbers = {"warmup_steps": self.warmup_steps, "accumulate": self.accumulate}
        return {"schedule": schedule, **numbers}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmUp":
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})


def make_schedule(
    kind: str, learning_rate: float, steps: int, warmup_steps: int = 0, accumulate: int = 1
) -> WarmUp:
    """Returns a schedule that ends at 0 after `steps`, or never falls.

    Args:
        kind: `"cosine"`, `"linear"` or `"constant"`.
        learning_rate: The highest, reached after the warm-up.
        steps: All steps, those of the warm-up included.
        warmup_steps: Steps in which the rate rises in a straight line.
        accumulate: Batches that make one step.

    Raises:
        ValueError: At an unknown kind, or no step left after the warm-up.
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
    learning_rate: Any,
    accumulate: int = 1,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
) -> keras.optimizers.Optimizer:
    """Returns AdamW as language models are usually tuned with it.

    Args:
        learning_rate: A number or a schedule, which Keras asks for the rate of each batch.
        accumulate: Batches whose mean gradient makes one step.
        clip_norm: Longest the gradient may be, all variables together; `None` for no limit.
        weight_decay: Not applied to biases and norms.
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
