"""SVF: a factor for each singular value of a matrix."""

import keras
import numpy as np
from keras import ops

from functional_llm.graph.placing import to_numpy
from functional_llm.graph.selection import Where
from functional_llm.graph.types import Tensor
from functional_llm.peft.adapter import DEFAULT_TARGETS, Adapter, attach
from functional_llm.peft.decomposition import singular_directions
from functional_llm.peft.linear import Linear

# How far singular values, as shares of the largest, and directions may be from the file's.
_TOLERANCE = 1e-3


@keras.saving.register_keras_serializable("functional_llm")
class SVF(Adapter):
    """`U diag(s z) V` for `W = U diag(s) V`; z is 1 at first.

    Only z trains and is saved; U, s and V follow from the base's weights. Where singular values
    are nearly equal, rounding decides which is which: so the file has a fingerprint of them.
    """

    def make_weights(self, linear: Linear) -> None:
        matrix = to_numpy(linear.kernel())
        vt = singular_directions(matrix)
        self.us = self.add_constant(matrix @ vt.T, "singular_inputs")
        self.v = self.add_constant(vt, "singular_outputs")
        self.z = self.add_weight((len(vt),), "ones", name="z")

    def fingerprint(self) -> np.ndarray:
        """Returns s, and how far each direction points along a fixed one; (2, k), float32."""
        us, vt = (to_numpy(x) for x in (self.us, self.v))
        probe = np.random.default_rng(0).normal(size=(vt.shape[1],)).astype("float32")
        return np.stack([np.linalg.norm(us, axis=0), np.abs(vt @ probe)])

    def check_fingerprint(self, saved: np.ndarray) -> None:
        """Raises a ValueError if z belongs to other directions than those of this base."""
        s, along = self.fingerprint()
        moved = np.abs(to_numpy(self.z) - 1)
        if saved.shape != (2, len(s)):
            raise ValueError(f"expected a fingerprint of shape (2, {len(s)}): {saved.shape}")
        distance = np.abs(s - saved[0]).max() / max(s.max(), 1e-30)
        # A direction that z does not change may be another one.
        turned = (np.abs(along - saved[1]) * moved).max()
        if not max(distance, turned) <= _TOLERANCE:
            raise ValueError(
                "the singular values of the weights are not those that z was trained for: "
                f"expected {saved[0][:3].round(5).tolist()}, received {s[:3].round(5).tolist()} "
                f"(directions differ by {turned:.2g}). Load the base model that it was trained "
                "with, in the same dtype and quantisation"
            )

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

    Every target's matrix is decomposed, and both parts of it stay in memory. The directions are
    kept beside the downloads (`FUNCTIONAL_LLM_CACHE`): the second time they are only read.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer except the head.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.

    Reference:
        [Transformer-Squared](https://arxiv.org/abs/2501.06252), section 3.2.
    """
    return attach(model, SVF, targets, adapter_name, dtype=dtype)
