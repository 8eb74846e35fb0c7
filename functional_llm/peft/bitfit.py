"""BitFit: only biases train."""

import keras

from functional_llm.graph.selection import Where
from functional_llm.graph.types import Tensor
from functional_llm.peft.adapter import Adapter, attach
from functional_llm.peft.linear import Linear


@keras.saving.register_keras_serializable("functional_llm")
class BitFit(Adapter):
    """`x W + b + c`; c is 0 at first.

    If the layer has no bias, merging gives it one: such a model may not fit its family's
    checkpoints any more.
    """

    def make_weights(self, linear: Linear) -> None:
        self.offset = self.add_weight((linear.out_size,), "zeros", name="bias")

    def bias_change(self) -> Tensor:
        return self.offset


def bitfit(
    model: keras.Model,
    targets: Where = "all",
    adapter_name: str = "default",
    dtype: str = "float32",
) -> keras.Model:
    """Returns a model in which only the biases of its linear layers train.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer except the head.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [BitFit](https://arxiv.org/abs/2106.10199).
    """
    return attach(model, BitFit, targets, adapter_name, dtype=dtype)
