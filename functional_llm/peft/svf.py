"""SVF: a factor for each singular value of a matrix."""

from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.graph.selection import Where
from functional_llm.peft.adapter import QUERY_AND_VALUE, Adapter, attach
from functional_llm.peft.linear import Linear


@keras.saving.register_keras_serializable("functional_llm")
class SVF(Adapter):
    """`U diag(s z) V` for `W = U diag(s) V`; z is 1 at first.

    Only z trains and is saved; U, s and V follow from the base's weights.
    """

    def make_weights(self, linear: Linear) -> None:
        u, s, vt = np.linalg.svd(ops.convert_to_numpy(linear.kernel()), full_matrices=False)
        self.us = self.add_constant(u * s, "singular_inputs")
        self.v = self.add_constant(vt, "singular_outputs")
        self.z = self.add_weight(s.shape, "ones", name="z")

    def kernel_change(self) -> Any:
        return ops.matmul(self.us * (self.z - 1), self.v)

    def change(self, x: Any, training: bool | None = None) -> Any:
        if not isinstance(self.linear.layer, keras.layers.Dense):
            return self.linear.apply(x, self.kernel_change())
        return ops.matmul(ops.matmul(x, self.us) * (self.z - 1), self.v)


def svf(
    model: Any,
    targets: Where = QUERY_AND_VALUE,
    adapter_name: str = "default",
    dtype: str = "float32",
) -> Any:
    """Returns a model in which only a factor for each singular value trains.

    It decomposes every matrix it is put on, and keeps both parts of each in memory.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer but the head.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [Transformer-Squared](https://arxiv.org/abs/2501.06252), section 3.2.
    """

    def make(layer: Any, path: str, **kwargs: Any) -> Any:
        return SVF(layer, dtype=dtype, **kwargs)

    return attach(model, make, targets, adapter_name)
