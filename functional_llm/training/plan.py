"""How many steps a run takes, and how large they are, where nobody has said it."""

from dataclasses import dataclass

# SmolLM2 with LoRA, 27 chats about a new name in 3 rows, batches of one: after 36 steps it gives
# the name, after 60 also the maker's, in a question of another form. The loss stays then.
LEAST_STEPS = 60
_ROWS = 4
_BATCHES_A_PASS = 8  # as many as the data give, before a batch takes more rows
_PASSES = 3.0


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Args:
        batch_size: Rows of a batch.
        steps: Updates of the weights.
        passes: How often each row is seen; `None` where nobody knows how many there are.
        advice: A sentence about what may be wrong with it; `""` if nothing may.
    """

    batch_size: int
    steps: int
    passes: float | None
    advice: str

    def describe(self) -> str:
        """Returns the size in words."""
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        seen = "a stream" if self.passes is None else f"each row is seen {self.passes:.1f} times"
        return f"{self.steps} steps, batches of {rows}: {seen}"


def plan_run(
    num_rows: int | None,
    *,
    batch_size: int | None = None,
    accumulate: int = 1,
    epochs: float | None = None,
    steps: int | None = None,
) -> Plan:
    """Returns the size of a run; what is not given is chosen.

    A batch has four rows; fewer of small data, so that a pass over them makes eight. A run makes
    three passes, or more of small data, so that it has enough steps to change an answer.

    Args:
        num_rows: Rows of the training data; `None` for a stream, whose steps must be given.
        batch_size: Rows of a batch.
        accumulate: Batches of one step.
        epochs: Passes over the data, unless `steps` is given.
        steps: Updates of the weights.

    Raises:
        ValueError: If the number of rows is not known, and not that of steps either.
    """
    if num_rows is None:
        if steps is None:
            raise ValueError(
                "Expected `steps` for a stream, whose length is not known before it ends, received "
                "none. Passes over it (`epochs`) cannot be counted beforehand."
            )
        return Plan(batch_size or _ROWS, steps, None, _advise(steps, None))
    batch_size = batch_size or max(1, min(_ROWS, num_rows // (_BATCHES_A_PASS * accumulate)))
    rows_a_step = batch_size * accumulate
    if steps is None and epochs is not None:
        steps = max(1, round(epochs * num_rows / rows_a_step))
    elif steps is None:
        steps = max(LEAST_STEPS, round(_PASSES * num_rows / rows_a_step))
    passes = steps * rows_a_step / num_rows
    return Plan(batch_size, steps, passes, _advise(steps, passes))


def _advise(steps: int, passes: float | None) -> str:
    if steps < LEAST_STEPS:
        return (
            f"{steps} steps are few: answers may stay as they were. The default is at least "
            f"{LEAST_STEPS}."
        )
    if passes is not None and passes > _PASSES:
        return (
            f"The data are small: each row is seen {passes:.0f} times. If answers stay as they "
            "were, take more steps; if the held-out loss rises, fewer; if answers to other "
            "questions change, add chats about those."
        )
    return ""
