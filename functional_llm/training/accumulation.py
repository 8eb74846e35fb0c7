"""Gradient accumulation: several batches whose step is that of one batch of all their rows."""

import jax
import jax.numpy as jnp
import keras

from functional_llm.graph.keras_private import accumulation_variables
from functional_llm.training.rematerialize import Values


class TokenMean:
    """Makes an accumulated gradient the mean over all tokens of a step's batches.

    A Keras optimizer with `gradient_accumulation_steps=A` adds up the gradients of A batches and
    divides the sum by A. A batch's loss is the mean over its own tokens, so each batch would count
    alike, however few its labels are. How many labels a step has is known with its last batch only.
    So the sum is kept as if the step ended with each batch: before the gradient of a batch with n
    labels is added to that of m labels, the sum shrinks by m / (m + n), and the batch's loss is
    multiplied by A n / (m + n).

    Args:
        optimizer: An optimizer with `gradient_accumulation_steps`. It gets one more variable, which
            counts the labels of the step.
    """

    _NAME = "accumulated_labels"

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
        self._inner = inner
        self._steps = inner.gradient_accumulation_steps
        present = (v for v in inner.variables if v.name == self._NAME)
        self._count = next(present, None) or inner.add_variable((), name=self._NAME)

    def begin_batch(self, optimizer_variables: Values, count: jax.Array) -> Values:
        """Returns the optimizer's values before a batch with so many labels.

        Args:
            optimizer_variables: The values of the optimizer's variables.
            count: The sum of the weights of the batch's labels.
        """
        index = {id(v): i for i, v in enumerate(self._optimizer.variables)}
        batches_done, sums = accumulation_variables(self._inner)
        values = list(optimizer_variables)
        is_first = values[index[id(batches_done)]] % self._steps == 0
        before = jnp.where(is_first, 0.0, values[index[id(self._count)]])
        after = before + count
        for i in (index[id(x)] for x in sums):
            values[i] = values[i] * (before / jnp.maximum(after, 1e-9)).astype(values[i].dtype)
        values[index[id(self._count)]] = after
        return values

    def end_batch(self, before: Values, after: Values) -> Values:
        """Returns the optimizer's values after a batch: as if it had not been, if it was skipped.

        A `LossScaleOptimizer` skips a batch whose gradients are not finite.

        Args:
            before: The values before `begin_batch`.
            after: Those after the batch.
        """
        index = {id(v): i for i, v in enumerate(self._optimizer.variables)}
        batches_done, sums = accumulation_variables(self._inner)
        at, values = index[id(batches_done)], list(after)
        is_counted = after[at] != before[at]
        for i in (index[id(x)] for x in (self._count, *sums)):
            values[i] = jnp.where(is_counted, after[i], before[i])
        return values

    def factor(self, optimizer_variables: Values, count: jax.Array) -> jax.Array:
        """Returns what a batch's mean loss is multiplied by; after `begin_batch`."""
        variables = self._optimizer.variables
        at = next(i for i, v in enumerate(variables) if v is self._count)
        return self._steps * count / jnp.maximum(optimizer_variables[at], 1e-9)
