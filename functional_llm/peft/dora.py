"""DoRA: LoRA for the directions of a matrix's columns, and a length for each.

A column is what makes one output.
"""

from typing import Any

import keras
from keras import ops

from functional_llm.graph.selection import Where
from functional_llm.peft.adapter import attach, rank_for, seed_for, targets_for, value_for
from functional_llm.peft.linear import Linear
from functional_llm.peft.lora import LoRA


@keras.saving.register_keras_serializable("functional_llm")
class DoRA(LoRA):
    """`m * V / |V|` with `V = W + alpha / R * A B`, and m the lengths of the columns of W at first.

    The lengths |V| count as constants for the gradient, as in section 4.3 of the paper.

    Args:
        base: As for `Adapter`.
        **kwargs: As for `LoRA`, but for `init`.
    """

    def make_weights(self, linear: Linear) -> None:
        if self.init != "zeros":
            raise ValueError(f"DoRA begins with init 'zeros'. Received: {self.init!r}.")
        super().make_weights(linear)
        self.magnitude = self.add_weight((linear.out_size,), "ones", name="magnitude")
        self.magnitude.assign(column_lengths(linear.kernel()))

    def _ratio(self) -> Any:
        """M / |V|, for each output."""
        sum_ = self.linear.kernel() + super().kernel_change()
        return self.magnitude / ops.stop_gradient(column_lengths(sum_))

    def kernel_change(self) -> Any:
        kernel = self.linear.kernel()
        return self._ratio() * (kernel + super().kernel_change()) - kernel

    def change(self, x: Any, training: bool | None = None) -> Any:
        dropped = x if self.dropout is None else self.dropout(x, training=training)
        ratio = self.linear.as_output(self._ratio())
        low_rank = self.linear.apply(dropped, ops.matmul(self.a, self.b)) * self.scale
        if isinstance(self.linear.layer, keras.layers.Dense):
            low_rank = ops.matmul(ops.matmul(dropped, self.a), self.b) * self.scale
        return (ratio - 1) * self.linear.product(dropped) + ratio * low_rank

    def get_options(self) -> dict[str, Any]:
        return {key: x for key, x in super().get_options().items() if key != "init"}


def column_lengths(matrix: Any) -> Any:
    """Returns the length of each column of a matrix (in, out)."""
    return ops.sqrt(ops.sum(ops.square(matrix), axis=0))


def dora(
    model: Any,
    rank: int | dict[str, int] = 8,
    alpha: float | dict[str, float] = 16,
    targets: Where | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    adapter_name: str = "default",
    dtype: str = "float32",
    seed: int | None = None,
) -> Any:
    """Returns a model with DoRA; nothing else trains in it.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        rank: As for `lora`.
        alpha: As for `lora`.
        targets: As for `lora`.
        dropout: As for `lora`.
        rslora: As for `lora`.
        adapter_name: As for `lora`.
        dtype: As for `lora`.
        seed: As for `lora`.

    Reference:
        [DoRA](https://arxiv.org/abs/2402.09353), equation 5.
    """

    def make(layer: Any, path: str, **kwargs: Any) -> Any:
        return DoRA(
            layer,
            rank=rank_for(path, rank, layer),
            alpha=value_for(path, alpha, "alpha"),
            dropout=dropout,
            rslora=rslora,
            seed=seed_for(path, seed),
            dtype=dtype,
            **kwargs,
        )

    return attach(model, make, targets_for(targets, rank), adapter_name)
