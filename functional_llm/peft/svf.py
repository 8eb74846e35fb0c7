"""SVF: a factor for each singular value of a matrix."""

import keras
import numpy as np
from keras import ops

from functional_llm.graph.selection import Where
from functional_llm.graph.types import Tensor
from functional_llm.peft.adapter import DEFAULT_TARGETS, Adapter, attach
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

    def kernel_change(self) -> Tensor:
        return ops.matmul(self.us * (self.z - 1), self.v)

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self.linear.apply_factors(x, self.us * (self.z - 1), self.v)


def svf(
    model: keras.Model,
    targets: Where = DEFAULT_TARGETS,
    adapter_name: str = "default",
    dtype: str = "float32",
) -> keras.Model:
    """Returns a model in which only a factor for each singular value trains.

    Every target's matrix is decomposed, and both parts of it stay in memory.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer except the head.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [Transformer-Squared](https://arxiv.org/abs/2501.06252), section 3.2.
    """
    return attach(model, SVF, targets, adapter_name, dtype=dtype)
