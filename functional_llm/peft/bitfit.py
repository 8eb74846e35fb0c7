"""BitFit: only biases train."""

from typing import Any

import keras

from functional_llm.graph.selection import Where
from functional_llm.peft.adapter import Adapter, attach
from functional_llm.peft.linear import Linear


@keras.saving.register_keras_serializable("functional_llm")
class BitFit(Adapter):
    """`x W + b + c`; c is 0 at first.

    Where the layer has no bias, merging gives it one: such a model may not fit its family's
    checkpoints any more.
    """

    def make_weights(self, linear: Linear) -> None:
        self.offset = self.add_weight((linear.out_size,), "zeros", name="bias")

    def bias_change(self) -> Any:
        return self.offset


def bitfit(
    model: Any, targets: Where = "all", adapter_name: str = "default", dtype: str = "float32"
) -> Any:
    """Returns a model in which only the biases of its linear layers train.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer but the head.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [BitFit](https://arxiv.org/abs/2106.10199).
    """

    def make(layer: Any, path: str, **kwargs: Any) -> Any:
        return BitFit(layer, dtype=dtype, **kwargs)

    return attach(model, make, targets, adapter_name)
