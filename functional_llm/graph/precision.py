"""float32 that is float32 on every chip."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import keras


def full_float32(dtype: str) -> AbstractContextManager[object]:
    """Inside, products that are traced have the precision that `dtype` promises.

    JAX multiplies float32 in TF32 (10 bits of 23) on NVIDIA GPUs and in bfloat16 (7 bits) on TPUs
    unless it is told otherwise: logits are off by up to 4e-2 there. Gradients inherit the precision
    of their products. CPUs know no other.

    A precision that the user has set wins: `jax.config.update("jax_default_matmul_precision",
    "tensorfloat32")` or `with jax.default_matmul_precision(...)`.

    Args:
        dtype: What the products of a model compute in. Only `"float32"` changes anything.

    Reference:
        [jax.default_matmul_precision](https://docs.jax.dev/en/latest/_autosummary/jax.default_matmul_precision.html).
    """
    config: Any = jax.config
    is_jax = keras.backend.backend() == "jax"
    if is_jax and dtype == "float32" and config.jax_default_matmul_precision is None:
        return jax.default_matmul_precision("float32")
    return nullcontext()


class FullFloat32:
    """A mixin for models: what they multiply in float32 has that precision on every chip.

    It holds for all that traces the model: calls, steps of training and evaluation, and their
    gradients. Put this class before `keras.Model`.
    """

    @property
    def product_dtype(self) -> str:
        """The dtype that most products of the model compute in."""
        return str(self.compute_dtype)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with full_float32(self.product_dtype):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def stateless_call(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.stateless_call`, which does not come by `__call__`."""
        with full_float32(self.product_dtype):
            return super().stateless_call(*args, **kwargs)  # type: ignore[misc]

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.train_step`; around all of it, for gradients that are functions."""
        with full_float32(self.product_dtype):
            return super().train_step(*args, **kwargs)  # type: ignore[misc]

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.test_step`."""
        with full_float32(self.product_dtype):
            return super().test_step(*args, **kwargs)  # type: ignore[misc]
