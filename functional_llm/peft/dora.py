"""DoRA: LoRA for the directions of a matrix's columns, and a length for each.

A column is what makes one output.
"""

import keras
from keras import ops

from functional_llm.graph.selection import Where
from functional_llm.graph.types import JSON, Tensor
from functional_llm.peft.adapter import attach, targets_for
from functional_llm.peft.linear import Linear
from functional_llm.peft.lora import LoRA


@keras.saving.register_keras_serializable("functional_llm")
class DoRA(LoRA):
    """`m * V / |V|` with `V = W + alpha / R * A B`, and m the lengths of the columns of W at first.

    The lengths |V| count as constants for the gradient, as in section 4.3 of the paper. The options
    are those of `LoRA` without `init`.
    """

    changes_experts = False

    def make_weights(self, linear: Linear) -> None:
        if self.init != "zeros":
            raise ValueError(f"DoRA begins with init 'zeros'. Received: {self.init!r}.")
        super().make_weights(linear)
        self.magnitude = self.add_weight((linear.out_size,), "ones", name="magnitude")
        self.magnitude.assign(column_lengths(linear.kernel()))

    def _ratio(self) -> Tensor:
        """M / |V|, for each output."""
        sum_ = self.linear.kernel() + super().kernel_change()
        return self.magnitude / ops.stop_gradient(column_lengths(sum_))

    def kernel_change(self) -> Tensor:
        kernel = self.linear.kernel()
        return self._ratio() * (kernel + super().kernel_change()) - kernel

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        dropped = self.drop(x, training)
        ratio = self.linear.as_output(self._ratio())
        return (ratio - 1) * self.linear.product(dropped) + ratio * self.low_rank_product(dropped)

    def get_options(self) -> JSON:
        return {name: value for name, value in super().get_options().items() if name != "init"}


def column_lengths(matrix: Tensor) -> Tensor:
    """Returns the length of each column of a matrix (in, out)."""
    return ops.sqrt(ops.sum(ops.square(matrix), axis=0))


def dora(
    model: keras.Model,
    rank: int | dict[str, int] = 8,
    alpha: float | dict[str, float] = 16,
    targets: Where | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    adapter_name: str = "default",
    dtype: str = "float32",
    seed: int | None = None,
) -> keras.Model:
    """Returns a model with DoRA; nothing else trains in it.

    The arguments mean what they mean for `lora`.

    Reference:
        [DoRA](https://arxiv.org/abs/2402.09353), equation 5.
    """
    return attach(
        model,
        DoRA,
        targets_for(targets, rank),
        adapter_name,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        seed=seed,
        dtype=dtype,
    )
